"""Cases of the check at start-up for attention across ranks (``kernels/self_test.py``).

The ranks of a sequence attend block by block and join the blocks by the log-sum-exp that the fused kernel returns. A
kernel that returned another base, or other gradients for a joined log-sum-exp, would train wrongly without an error.
The cases run every rank of a short sequence in one process, and compare them with plain attention. Another case joins
two blocks of many queries, because a kernel whose warps disturb each other is right while a GPU has little to do.

Legend: n ranks, L tokens of a rank, B rows, H query heads, G key heads, K key, V value width.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import ParallelLayout, Work
from hylo_megatron.kernels import attention
from hylo_megatron.kernels.choose import Ops
from hylo_megatron.kernels.self_test import Case, random_bf16
from hylo_megatron.parallel.attention import Shared, attention_across_ranks
from hylo_megatron.parallel.exchange import Arrival, StandIn
from hylo_megatron.parallel.zigzag import zigzag_positions

CHUNK = 128  # tokens: a rank has two chunks
JOINED = 8, 2**14  # heads and queries of two blocks that are joined: thousands of programs, as in a training
BLAME = (
    "torch's fused kernel for these widths returns a log-sum-exp or gradients that cannot be joined; train with"
    " --context-parallel-size 1 or another version of torch or cuDNN, --no-self-test trains anyway"
)


class _AllHere:
    """The tensors of all ranks ``[n,..]`` in one process, with the methods of ``exchange.Gather``."""

    def __init__(self, rank: int, size: int):
        self.rank, self.size = rank, size

    def arrivals(self, everyone: Tensor) -> Iterator[Arrival]:
        self.kept = everyone
        for ranks in (range(self.rank, self.rank + 1), range(self.rank), range(self.rank + 1, self.size)):
            if ranks:
                yield ranks, everyone[ranks.start : ranks.stop]

    def arrivals_again(self, kept: Tensor) -> Iterator[Arrival]:
        self.gradients = torch.zeros_like(kept)
        yield from self.arrivals(kept)

    def gradient(self, ranks: range, d_tensors: Tensor) -> None:
        self.gradients[ranks.start : ranks.stop] = d_tensors

    def total(self) -> Tensor:
        return self.gradients


class _Together(Shared):
    """``Shared`` of a rank that holds the tensors of all ranks."""

    def exchange(self, latents_LBR: Tensor) -> _AllHere:
        return _AllHere(self.group.rank(), self.group.size())


@dataclass(frozen=True, kw_only=True)
class Widths:
    """Heads of a rank and widths of a softmax layer."""

    heads: int
    groups: int
    key: int
    value: int


def widths_of(arch: Architecture, kind: str, tp: int) -> Widths:
    heads = arch.num_attention_heads // tp
    if kind == "attention":
        return Widths(heads=heads, groups=arch.num_key_value_heads // tp, key=arch.head_dim, value=arch.head_dim)
    g = arch.geometry.mla
    return Widths(heads=heads, groups=heads, key=g.qk_nope_head_dim + g.qk_rope_head_dim, value=g.v_head_dim)


def _of_ranks(x_SB: Tensor, ranks: int) -> list[Tensor]:
    """Return each rank's tokens."""
    return [x_SB[zigzag_positions(len(x_SB) // ranks, ranks, rank)] for rank in range(ranks)]


def _across_ranks(q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor, *, ranks: int) -> Tensor:
    """Return the attention of all ranks ``[B,H,S,V]``, rank after rank."""
    groups, widths = k_SBGK.shape[2], [k_SBGK.shape[-1], v_SBGV.shape[-1]]
    held = torch.stack(_of_ranks(torch.cat([k_SBGK, v_SBGV], -1).flatten(2), ranks))

    def expand(held_LBR: Tensor, rank: int, keys: slice) -> tuple[Tensor, ...]:
        return held_LBR.unflatten(-1, (groups, -1)).permute(1, 2, 0, 3).split(widths, -1)

    shared = partial(_Together, scale=widths[0] ** -0.5, expand=expand, values=groups * sum(widths))
    return torch.cat([
        attention_across_ranks(q.permute(1, 2, 0, 3), held, shared(group=StandIn(rank, ranks)))
        for rank, q in enumerate(_of_ranks(q_SBHK, ranks))
    ], 2)  # fmt: skip


def _on_one_device(q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor, *, ranks: int) -> Tensor:
    """Return what ``_across_ranks`` does, by plain attention of the complete sequence."""
    q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHK, k_SBGK, v_SBGV))
    out_BHSV, _ = attention.attend_plain(q, k, v, True, q.shape[-1] ** -0.5)
    return torch.cat(_of_ranks(out_BHSV.permute(2, 0, 1, 3), ranks)).permute(1, 2, 0, 3)


def attention_case(at: Widths, ranks: int, rows: int, device) -> Case:
    """The attention of ``ranks`` ranks. Three ranks have every kind of block, and sum blocks as more ranks do."""
    sizes = (at.heads, at.key), (at.groups, at.key), (at.groups, at.value)
    inputs = [random_bf16(2 * CHUNK * ranks, rows, *size, device=device).roll(i, -1) for i, size in enumerate(sizes)]
    return Case(
        inputs,
        run=lambda kernels, *given: _across_ranks(*given, ranks=ranks),
        reference=lambda kernels, *given: _on_one_device(*given, ranks=ranks),
        blame=BLAME,
    )


def joining_case(at: Widths, device) -> Case:
    """The joining of two blocks, which has no gradients: the backward pass joins nothing."""
    parts = [random_bf16(1, *JOINED, at.value, device=device).roll(i, 2) for i in range(2)]
    sums = [random_bf16(1, *JOINED, device=device).roll(i, 2).float() for i in range(2)]

    def run(kernels: Ops, out, lse, part, part_lse):
        out, lse = out.detach().clone(), lse.detach().clone()
        kernels.join_attention(out, lse, part.detach(), part_lse.detach())
        return torch.cat([out, lse.unsqueeze(-1).to(out.dtype)], -1)

    blame = "the kernel that joins blocks of attention is wrong on this GPU; train with --context-parallel-size 1"
    return Case([parts[0], sums[0], parts[1], sums[1]], run, blame=blame)


def attention_cases(models: list[Architecture], layout: ParallelLayout, work: Work, device) -> dict[str, Case]:
    """Return the cases of each width of softmax attention in ``models``; none without context parallelism."""
    if layout.cp == 1:
        return {}
    ranks, rows = min(layout.cp, 3), min(work.micro_batch, 2)
    found = {
        widths_of(arch, kind, layout.tp): f"{kind} across ranks"
        for arch in models
        for kind in ("attention", "mla")
        if kind in arch.plan
    }
    whole = {name: attention_case(widths, ranks, rows, device) for widths, name in found.items()}
    return whole | {f"{name}, joined": joining_case(widths, device) for widths, name in found.items()}
