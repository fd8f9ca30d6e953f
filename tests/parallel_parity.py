"""One training step on any parallel layout: losses and whole gradients, as numbers to compare.

``python parallel_parity.py WORK`` under torchrun runs every cell of WORK/cells.json and writes WORK/NAME.pt.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
import train_helpers as helpers  # before megatron: it starts the engine
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.global_vars import set_args, unset_global_variables

from hylo_megatron.config import Architecture
from hylo_megatron.distill import batches
from hylo_megatron.distill.engine_hooks import StepLog
from hylo_megatron.distill.kl import KLSettings
from hylo_megatron.distill.model import DistillModel, DistillSettings
from hylo_megatron.layers.load import layout_config, load_model, start_process_groups

ROWS, MICRO = 4, 2
# kl and ce together, tempered, in chunks that do not divide the tokens, with a teacher for the first two thirds
KL = KLSettings(kl_weight=0.7, ce_weight=0.3, temperature=2.0, chunk=50, teacher_length=40, ce_beyond=0.5)


@dataclass
class Cell:
    """``student`` and ``teacher`` are checkpoints; ``train``: see ``DistillSettings``."""

    name: str
    student: str
    teacher: str
    stage: str
    train: str
    tp: int = 1
    pp: int = 1
    cp: int = 1
    sp: bool = False
    cp_comm_type: str = "all_gather"
    linear_cp: str = "auto"


def distill_model(student, teacher, stage, train, config=None, linear_cp="auto", **settings) -> DistillModel:
    """A ``DistillModel`` of two checkpoints on the current process groups; ``config``: fields of both configs."""
    models = [
        load_model(folder, layout_config(Architecture.load(folder), **(config or {})), linear_cp=linear_cp)
        for folder in (student, teacher)
    ]
    (a, a_arch), (b, b_arch) = models
    return DistillModel(a, b, a_arch, b_arch, DistillSettings(stage, train, **settings))


def sample_rows(rank: int, size: int):
    """Micro-batches of one data-parallel rank, with a mask that differs from row to row."""
    batch = helpers.token_batch(ROWS, helpers.SEQ)
    for start in range(rank * MICRO, ROWS, size * MICRO):
        yield {key: value[start : start + MICRO] for key, value in batch.items()}


def whole_gradients(model: DistillModel) -> tuple[dict, float]:
    """Gradients put together from all ranks under checkpoint names, and by how much replicas differ at most."""
    for parameter in model.student.parameters():
        parameter.data = parameter.main_grad if parameter.requires_grad else torch.full_like(parameter, torch.nan)
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    sharded = model.sharded_state_dict(metadata=metadata)
    apply_factories(sharded)
    shards, queue = [], list(sharded.values())
    while queue:
        item = queue.pop()
        if isinstance(item, ShardedTensor):
            place = tuple(slice(o, o + n) for o, n in zip(item.global_offset, item.local_shape, strict=True))
            data = item.data.reshape(item.local_shape).float()
            shards.append((item.key, tuple(item.global_shape), place, data))
        elif isinstance(item, dict | list):
            queue += item.values() if isinstance(item, dict) else item
    everyone = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, shards)
    whole, spread = {}, 0.0
    for key, shape, place, data in (shard for rank in everyone for shard in rank):
        if data.isnan().all():  # frozen
            continue
        target = whole.setdefault(key, torch.full(shape, torch.nan))
        seen = target[place]
        if not seen.isnan().any():
            spread = max(spread, ((seen - data).abs().max() / data.abs().max().clamp_min(1e-30)).item())
        target[place] = data
    return whole, spread


def perturb(model: DistillModel, relative: float) -> None:
    """Moves every weight by noise of that size: 3e-8 is about what storing it in fp32 may change."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + relative * torch.randn(parameter.shape, generator=generator))


def run_cell(cell: Cell, log_path: Path, noise: float = 0.0) -> dict:
    """One step as ``megatron.training`` takes it: schedule, loss function, gradient reduction, log line."""
    start_process_groups(cell.tp, cell.pp, cell.cp)
    unset_global_variables()
    set_args(SimpleNamespace(hylo_stage=cell.stage, hylo_teacher_length=KL.teacher_length))
    model = distill_model(
        cell.student, cell.teacher, cell.stage, cell.train, kl=KL, linear_cp=cell.linear_cp,
        config=dict(sequence_parallel=cell.sp, cp_comm_type=cell.cp_comm_type, calculate_per_token_loss=True,
                    deallocate_pipeline_outputs=True,
                    finalize_model_grads_func=finalize_model_grads),
    )  # fmt: skip
    perturb(model, noise)
    settings = DistributedDataParallelConfig(grad_reduce_in_fp32=True, use_distributed_optimizer=False)
    wrapped = DistributedDataParallel(model.config, settings, model)
    wrapped.zero_grad_buffer()
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    stored = get_forward_backward_func()(
        forward_step_func=batches.forward_step, data_iterator=sample_rows(rank, size), model=[wrapped],
        num_microbatches=ROWS // MICRO // size, seq_length=helpers.SEQ, micro_batch_size=MICRO, forward_only=False,
    )  # fmt: skip
    losses = {}
    for name in stored[0] if stored else ():
        total = torch.stack([entry[name] for entry in stored]).sum(0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        losses[name] = total[0] / total[1]
    sums = model.layer_sums.clone()
    arguments = dict(hylo_stage=cell.stage, global_batch_size=ROWS, seq_length=helpers.SEQ, hylo_log=str(log_path))
    weights = dict(hylo_ild_attention_weight=1.0, hylo_ild_hidden_weight=1.0)
    log = StepLog(SimpleNamespace(save=None, **arguments, **weights), [model])
    layers = log.layer_means()
    model.layer_sums += sums
    log.write(losses, 1, 0.1, None)
    gradients, spread = whole_gradients(model)
    return {"layers": layers, "gradients": gradients, "spread": spread}


def main(work: Path) -> None:
    for values in json.loads((work / "cells.json").read_text()):
        cell = Cell(**values)
        result = run_cell(cell, work / f"{cell.name}.jsonl")
        if dist.get_rank() == 0:
            torch.save(result, work / f"{cell.name}.pt")
            print(f"done {cell.name}", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
