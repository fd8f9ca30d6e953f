"""Linear blocks over a sequence that ranks share: states of a fixed size go from stretch to stretch, exact both ways.

A rank's two zig-zag stretches (``zigzag.py``) are rows of one batch, all rows' first stretch before the second. Both
recurrences, Gated DeltaNet (arXiv 2412.06464, section 3.1) and Mamba-2 (arXiv 2405.21060, section 2.1), are linear in
their state, so over a stretch

    last state = transfer · start + written        o_t = o_t from a zero state + read_t · start

with ``transfer`` and ``read_t`` that do not depend on the values. One scan from zero gives all four; then ``transfer``
and ``written`` of all stretches are gathered, and each rank composes those before its own. Backward is the transpose:
the gradients of all ``start`` are gathered, and each rank composes those after its own. The kernels are the ones of a
sequence that is whole, forward and backward, once each.

Legend: B rows (two for each sequence of this rank), S positions of a stretch, C channels, M key heads, H value heads,
K key dim, V value dim, G groups, P head dim, N state; n ranks, and 2n stretches in the order of the sequence.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import Ops, ops_for
from hylo_megatron.kernels.chunked import compute_dtype


class _OneRank:
    """A process group of one rank, as far as the engine's mixers ask."""

    def size(self) -> int:
        return 1

    def rank(self) -> int:
        return 0


def without_context_parallelism(pg_collection):
    """The same groups for a mixer of the engine that is to leave context parallelism to this file."""
    groups = copy.copy(pg_collection)
    groups.cp = _OneRank()
    return groups


def _chain(x_B: Tensor, group) -> Tensor:
    """``[B, ..]`` of every rank -> ``[2n, B/2, ..]``, in the order of the sequence."""
    everyone = x_B.new_empty(group.size() * len(x_B), *x_B.shape[1:])
    dist.all_gather_into_tensor(everyone, x_B.contiguous(), group=group)
    first, second = everyone.unflatten(0, (group.size(), 2, -1)).unbind(1)
    return torch.cat([first, second.flip(0)])


def _own(chain: Tensor | list[Tensor], rank: int) -> Tensor:
    """This rank's rows of a chain."""
    return torch.cat([chain[rank], chain[len(chain) - 1 - rank]])


def _beside(x_B: Tensor, group, step: int) -> Tensor:
    """The rows of the stretch before (``step`` 1) or after (-1) each of this rank's; zeros beyond the sequence."""
    chain = _chain(x_B, group)
    nothing = torch.zeros_like(chain[:1])
    chain = torch.cat([nothing, chain[:-1]] if step > 0 else [chain[1:], nothing])
    return _own(chain, group.rank())


class _Before(torch.autograd.Function):
    """``[B, ..]`` -> the same of the stretches before; a gradient goes back to where its values came from."""

    @staticmethod
    def forward(ctx, x_B, group):
        ctx.group = group
        return _beside(x_B, group, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_B):
        return _beside(d_B, ctx.group, -1), None


def _through(transfer: Tensor, state: Tensor) -> Tensor:
    """``transfer · state``, where one number a head (``[.., 1, 1]``) stands for that times the identity."""
    return transfer * state if transfer.shape[-1] == 1 else transfer @ state


class _Starts(torch.autograd.Function):
    """(transfer [B,H,K,K] or [B,H,1,1], written [B,H,K,V]) -> the states [B,H,K,V] that this rank's stretches start
    from: ``start_(i+1) = transfer_i start_i + written_i``."""

    @staticmethod
    def forward(ctx, transfer, written, group):
        rank, last = group.rank(), 2 * group.size() - 1 - group.rank()
        both = _chain(torch.cat([transfer.flatten(2), written.flatten(2)], -1), group)
        transfers, writes = both.split([transfer[0, 0].numel(), written[0, 0].numel()], -1)
        transfers, writes = transfers.unflatten(-1, transfer.shape[2:]), writes.unflatten(-1, written.shape[2:])
        starts = [torch.zeros_like(writes[0])]
        for i in range(last):
            starts.append(_through(transfers[i], starts[i]) + writes[i])
        own = torch.cat([starts[rank], starts[last]])
        ctx.group = group
        ctx.save_for_backward(transfers[rank + 1 :].contiguous(), own)
        return own

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_start):
        later, start = ctx.saved_tensors  # read once: under activation recompute it cannot be again
        rank, size = ctx.group.rank(), ctx.group.size()
        d_starts = _chain(d_start, ctx.group)
        d_end = torch.zeros_like(d_starts[0])  # of the last state of stretch i, which is the start of stretch i + 1
        own = {2 * size - 1: d_end}
        for i in reversed(range(rank, 2 * size - 1)):
            d_end = _through(later[i - rank].mT, d_end) + d_starts[i + 1]
            own[i] = d_end
        d_written = torch.cat([own[rank], own[2 * size - 1 - rank]])
        if later.shape[-1] == 1:
            return (d_written * start).sum((-1, -2), keepdim=True), d_written, None
        return d_written @ start.mT, d_written, None


def split_convolve(local: Ops, group, x_BSC: Tensor, weight: Tensor, bias: Tensor | None, sizes, start: int = 0):
    """As ``conv.split_convolve``: the few positions that the taps reach back to come from the stretch before."""
    back, channels = weight.shape[1] - 1, slice(start, start + len(weight))
    if x_BSC.shape[1] < back:
        raise HyLoError(
            f"stretches of {x_BSC.shape[1]} positions are shorter than the convolution's reach of {back}: use fewer"
            " context-parallel ranks or a longer sequence"
        )
    halo = _Before.apply(x_BSC[:, -back:, channels], group)
    halo = F.pad(halo, (start, x_BSC.shape[-1] - start - len(weight)))
    sections = local.split_convolve(torch.cat([halo, x_BSC], 1), weight, bias, sizes, start)
    return tuple(section[:, back:].contiguous() for section in sections)  # kernels need not know these strides


def chunk_gated_delta_rule(local: Ops, group, q_BSMK: Tensor, k_BSMK: Tensor, v_BSHV: Tensor, g: Tensor, beta: Tensor,
                           **kwargs) -> tuple[Tensor, None]:  # fmt: skip
    """As ``gated_delta.chunk_gated_delta_rule``. K more values, all 0, whose state starts as the identity, come out as
    ``read`` and end as ``transfer``: one scan of width V + K is cheaper than two."""
    key_dim, value_dim = k_BSMK.shape[-1], v_BSHV.shape[-1]
    eye = torch.eye(key_dim, dtype=compute_dtype(v_BSHV), device=v_BSHV.device)
    state = F.pad(eye, (value_dim, 0)).expand(len(v_BSHV), v_BSHV.shape[2], -1, -1)
    out, last = local.chunk_gated_delta_rule(
        q_BSMK, k_BSMK, F.pad(v_BSHV, (0, key_dim)), g=g, beta=beta, initial_state=state, output_final_state=True,
        **kwargs,
    )  # fmt: skip
    out_BSHV, read_BSHK = out.split([value_dim, key_dim], -1)
    written, transfer = last.split([value_dim, key_dim], -1)
    start = _Starts.apply(transfer, written, group)
    return out_BSHV + torch.einsum("bshk,bhkv->bshv", read_BSHK, start.to(read_BSHK.dtype)), None


def chunk_ssd(local: Ops, group, x_BSHP: Tensor, dt_BSH: Tensor, A_H: Tensor, B_BSGN: Tensor, C_BSGN: Tensor,
              chunk_size: int = 64, D: Tensor | None = None, *_) -> tuple[Tensor, None]:  # fmt: skip
    """As ``ssd.ssd_chunk_scan``: a head's ``transfer`` is one number, its decay over the stretch."""
    out_BSHP, written = local.chunk_ssd(
        x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, chunk_size, D, output_final_state=True
    )  # fmt: skip
    decay_BSH = (dt_BSH * A_H).double().cumsum(1).to(written.dtype).exp()
    start_BHPN = _Starts.apply(decay_BSH[:, -1, :, None, None], written, group)
    start = start_BHPN.unflatten(1, (C_BSGN.shape[2], -1)).to(C_BSGN.dtype)
    read_BSHP = torch.einsum("bsgn,bghpn->bsghp", C_BSGN, start).flatten(2, 3)
    return (out_BSHP + decay_BSH.unsqueeze(-1) * read_BSHP).to(out_BSHP.dtype), None


def kernels_across(group) -> Callable[[Tensor], Ops]:
    """``ops_for`` of a block whose sequence is shared by the ranks of ``group``."""

    def choose(x: Tensor) -> Ops:
        local = ops_for(x)
        own = dict(split_convolve=split_convolve, chunk_gated_delta_rule=chunk_gated_delta_rule, chunk_ssd=chunk_ssd)
        return replace(local, **{name: partial(function, local, group) for name, function in own.items()})

    return choose
