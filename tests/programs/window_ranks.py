"""Windows whose sequences ranks share, against one process: torchrun --nproc-per-node N this_file.py

Rank 0 prints one JSON line a case: the largest relative errors over all ranks of what ``with_halo`` fetches and of its
gradient, and of a window's output, its input's gradient and its parameters'.
"""

import json
from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from helpers import tiny
from megatron.core.process_groups_config import ProcessGroupCollection
from programs.parity import RefuseViews
from torch import Tensor

from hylo_megatron.engine.register import install
from hylo_megatron.layers import specs
from hylo_megatron.layers.load import layout_config, start_process_groups
from hylo_megatron.mixers.megatron_window import window_of
from hylo_megatron.parallel import halo, state_passing
from hylo_megatron.parallel.halo import Reach, with_halo
from hylo_megatron.parallel.zigzag import chunk_starts, zigzag_positions

install("megatron")
B, ARRIVE = 2, halo._Arrive


@dataclass
class Case:
    name: str
    size: int
    sinks: int
    length: int  # of a rank, in two chunks
    dtype: torch.dtype = torch.float64
    drop: str = ""  # what is left out


CASES = [
    Case("usual", 6, 2, 40), Case("fp32", 6, 2, 40, torch.float32), Case("bf16", 6, 2, 40, torch.bfloat16),
    Case("no sinks", 6, 0, 40), Case("one token", 1, 0, 8), Case("one token, sinks", 1, 3, 8),
    Case("larger than a chunk", 11, 2, 8), Case("larger than a rank's tokens", 21, 2, 8),
    Case("larger than the sequence", 300, 2, 12), Case("more sinks than a chunk has", 5, 9, 8),
    Case("no halo", 6, 2, 40, drop="halo"), Case("no gradient of the halo", 6, 2, 40, drop="gradient"),
]  # fmt: skip


def with_halo_plain(x_TBGY: Tensor, reach: Reach, rank: int) -> tuple[Tensor, Tensor]:
    """Return what a rank gets from ``with_halo``, computed from complete sequences."""
    rows, whole = x_TBGY.transpose(0, 1), reach.before + reach.length // 2
    padded = F.pad(rows, (0, 0, 0, 0, reach.before, 0))
    chunks = [padded[:, start : start + whole] for start in chunk_starts(reach.length, reach.ranks, rank)]
    return torch.cat(chunks), rows[:, : reach.first].repeat(2, 1, 1, 1)


def error(got: Tensor, want: Tensor) -> float:
    if not want.numel():
        return 0.0
    return ((got - want).abs().max() / want.abs().max().clamp_min(1e-30)).item()


class Dropping(halo._Arrive):
    """``_Arrive`` that leaves out what arrives, or its gradient."""

    what = ""

    @staticmethod
    def forward(ctx, *inputs):
        return ARRIVE.forward(ctx, *inputs) * (Dropping.what != "halo")

    @staticmethod
    def backward(ctx, d_R):
        return ARRIVE.backward(ctx, d_R * (Dropping.what != "gradient"))


def fetched(case: Case, group) -> dict[str, float]:
    """Return errors of ``with_halo`` and of its gradient against ``with_halo_plain``."""
    rank, size = group.rank(), group.size()
    reach, here = Reach.of_window(case.size, case.sinks, size, case.length), zigzag_positions(case.length, size, rank)
    whole = torch.randn(case.length * size, B, 2, 3, dtype=torch.double, requires_grad=True)
    own = whole.detach()[here].requires_grad_()
    got, want = with_halo(own, reach, group)(), with_halo_plain(whole, reach, rank)
    weights = [torch.randn_like(x) for x in want]
    (d_own,) = torch.autograd.grad(sum((x * w).sum() for x, w in zip(got, weights, strict=True)), own)
    (d_whole,) = torch.autograd.grad(sum((x * w).sum() for x, w in zip(want, weights, strict=True)), whole)
    d_whole = d_whole.contiguous()
    dist.all_reduce(d_whole)
    return {"fetched": max(map(error, got, want)), "gradient": error(d_own, d_whole[here])}


def make_window(case: Case, groups):
    window = {"size": case.size, "sinks": case.sinks}
    arch = tiny.hybrid("gdn", window=window, qk_norm=True, model_type="qwen3")
    module = window_of(arch, specs.backend("local"))(layout_config(arch), layer_number=1, pg_collection=groups)
    generator = torch.Generator().manual_seed(1)
    for name, parameter in module.named_parameters():
        parameter.data = tiny.scatter(name, tuple(parameter.shape), generator).to(case.dtype)
    return module


def gradients(module, hidden: Tensor, d_out: Tensor) -> list[Tensor]:
    hidden = hidden.clone().requires_grad_()
    out = module(hidden)
    return [out.detach(), *torch.autograd.grad((out * d_out).sum(), [hidden, *module.parameters()])]


def windows(case: Case, groups) -> dict[str, float]:
    """Return errors of a window that ranks share against the same module on one rank."""
    rank, size = groups.cp.rank(), groups.cp.size()
    hidden, d_out = (torch.randn(case.length * size, B, tiny.HIDDEN).to(case.dtype) for _ in range(2))
    want = gradients(make_window(case, state_passing.without_context_parallelism(groups)), hidden, d_out)
    here, module = zigzag_positions(case.length, size, rank), make_window(case, groups)
    found = [x.contiguous() for x in gradients(module, hidden[here], d_out[here])]
    for part in found[2:]:
        dist.all_reduce(part)
    want = [want[0][here], want[1][here], *want[2:]]
    names = ["output", "input", *(name for name, _ in module.named_parameters())]
    return {name: error(*pair) for name, *pair in zip(names, found, want, strict=True)}


def main() -> None:
    dist.init_process_group("gloo")
    start_process_groups(cp=dist.get_world_size())
    groups = ProcessGroupCollection.use_mpu_process_groups()
    for case in CASES:
        torch.manual_seed(2)
        Dropping.what, halo._Arrive = case.drop, Dropping if case.drop else ARRIVE
        with RefuseViews():
            errors = fetched(case, groups.cp) | windows(case, groups)
        everyone = [None] * groups.cp.size()
        dist.all_gather_object(everyone, errors)
        if dist.get_rank() == 0:
            worst = {name: max(errors[name] for errors in everyone) for name in errors}
            print(json.dumps({"case": case.name, **worst}), flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
