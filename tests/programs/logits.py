"""Logits on two ranks, run by test_megatron_parity.py: torchrun --nproc-per-node 2 this_file.py OUT CHECKPOINT...

Writes OUT/<layout>-<checkpoint>.pt for tensor parallelism (with and without sequence parallelism) and for pipeline
parallelism, all in one launch.
"""

import sys
from pathlib import Path

import torch
from helpers import tiny

from hylo_megatron.config import Architecture
from hylo_megatron.engine.register import install
from hylo_megatron.layers.load import layout_config, load_model, start_process_groups

install("megatron")
LAYOUTS = {"tp2": dict(tp=2), "tp2-sp": dict(tp=2), "pp2": dict(pp=2)}


@torch.no_grad()
def logits(model, tokens_BS: torch.Tensor) -> torch.Tensor | None:
    """Whole logits ``[B, S, V]``; None on stages before the last."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.mappings import gather_from_tensor_model_parallel_region

    batch, length = tokens_BS.shape
    if not parallel_state.is_pipeline_first_stage():
        hidden_SBD = torch.empty(length, batch, model.config.hidden_size)
        torch.distributed.recv(hidden_SBD, src=parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden_SBD)
    out = model.eval()(tokens_BS, torch.arange(length).expand(batch, -1), None)
    if not parallel_state.is_pipeline_last_stage():
        torch.distributed.send(out.contiguous(), dst=parallel_state.get_pipeline_model_parallel_next_rank())
        return None
    return gather_from_tensor_model_parallel_region(out)


def main(out: str, *checkpoints: str) -> None:
    for layout, sizes in LAYOUTS.items():
        start_process_groups(**sizes)
        for checkpoint in checkpoints:
            config = layout_config(Architecture.load(checkpoint), sequence_parallel=layout.endswith("sp"))
            model, arch = load_model(checkpoint, config)
            found = logits(model, tiny.tokens())
            if found is not None and torch.distributed.get_rank() == torch.distributed.get_world_size() - 1:
                torch.save(found[..., : arch.vocab_size], Path(out) / f"{layout}-{Path(checkpoint).name}.pt")
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(*sys.argv[1:])
