"""Linear blocks over a sequence that ranks share: states of a fixed size go from chunk to chunk, exact both ways.

A rank's two zig-zag chunks (``zigzag.py``) are rows of one batch, all rows' first chunk before the second. The
recurrences of linear blocks are linear in their state, so over a chunk

    last state = transfer · start + written        o_t = o_t from a zero state + read_t · start

with ``transfer`` and ``read_t`` that do not depend on the values. One scan from zero gives all four
(``mixers/state_passing.py``). Then ``transfer`` and ``written`` of all chunks are gathered, and each rank composes
those before its own (``starts``). Backward is the transpose: the gradients of all ``start`` are gathered, and each
rank composes those after its own. The kernels are those of a complete sequence, forward and backward, once each.

Legend: B rows (two for each sequence of this rank), S positions of a chunk, C channels, H value heads, K key dim,
V value dim; n ranks, and 2n chunks in the order of the sequence.
"""

import copy
from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import Ops, ops_for
from hylo_megatron.parallel.exchange import StandIn


def without_context_parallelism(pg_collection):
    """Return the same groups for a mixer of megatron-core that leaves context parallelism to this file."""
    groups = copy.copy(pg_collection)
    groups.cp = StandIn()
    return groups


def _chain(x_B: Tensor, group) -> Tensor:
    """``[B, ..]`` of every rank -> ``[2n, B/2, ..]``, in the order of the sequence."""
    everyone = x_B.new_empty(group.size() * len(x_B), *x_B.shape[1:])
    dist.all_gather_into_tensor(everyone, x_B.contiguous(), group=group)
    first, second = everyone.unflatten(0, (group.size(), 2, -1)).unbind(1)
    return torch.cat([first, second.flip(0)])


def _own(chain: Tensor | list[Tensor], rank: int) -> Tensor:
    """Return this rank's rows of a chain."""
    return torch.cat([chain[rank], chain[len(chain) - 1 - rank]])


def _beside(x_B: Tensor, group, step: int) -> Tensor:
    """Return the rows of the chunk before (``step`` 1) or after (-1) each of this rank's; zeros beyond the ends."""
    chain = _chain(x_B, group)
    nothing = torch.zeros_like(chain[:1])
    chain = torch.cat([nothing, chain[:-1]] if step > 0 else [chain[1:], nothing])
    return _own(chain, group.rank())


class _Before(torch.autograd.Function):
    """``[B, ..]`` -> the same values of the previous chunks. The gradient returns to the values' source."""

    @staticmethod
    def forward(ctx, x_B, group):
        ctx.group = group
        return _beside(x_B, group, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_B):
        return _beside(d_B, ctx.group, -1), None


def _through(transfer: Tensor, state: Tensor) -> Tensor:
    """Return ``transfer · state``. One number per head (``[.., 1, 1]``) means this number times the identity."""
    return transfer * state if transfer.shape[-1] == 1 else transfer @ state


class _Starts(torch.autograd.Function):
    """See ``starts``."""

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
        later, start = ctx.saved_tensors  # read only once, as activation recompute requires
        rank, size = ctx.group.rank(), ctx.group.size()
        d_starts = _chain(d_start, ctx.group)
        # gradient of the last state of chunk i, which is the start of chunk i + 1
        d_end = torch.zeros_like(d_starts[0])
        own = {2 * size - 1: d_end}
        for i in reversed(range(rank, 2 * size - 1)):
            d_end = _through(later[i - rank].mT, d_end) + d_starts[i + 1]
            own[i] = d_end
        d_written = torch.cat([own[rank], own[2 * size - 1 - rank]])
        if later.shape[-1] == 1:
            return (d_written * start).sum((-1, -2), keepdim=True), d_written, None
        return d_written @ start.mT, d_written, None


def starts(transfer: Tensor, written: Tensor, group) -> Tensor:
    """Return the states ``[B,H,K,V]`` that this rank's chunks start from.

    ``start_(i+1) = transfer_i start_i + written_i`` with ``written`` [B,H,K,V] and ``transfer`` [B,H,K,K], or
    [B,H,1,1] for a multiple of the identity.
    """
    return _Starts.apply(transfer, written, group)


def split_convolve(local: Ops, group, x_BSC: Tensor, weight: Tensor, bias: Tensor | None, sizes, start: int = 0):
    """Compute ``conv.split_convolve``; the positions before a chunk that the taps need come from the chunk before."""
    back, channels = weight.shape[1] - 1, slice(start, start + len(weight))
    if x_BSC.shape[1] < back:
        raise HyLoError(
            f"chunks of {x_BSC.shape[1]} positions are shorter than the convolution's reach of {back}: use fewer"
            " context-parallel ranks or a longer sequence"
        )
    halo = _Before.apply(x_BSC[:, -back:, channels], group)
    # contiguous, because kernels need not support these strides
    return tuple(part.contiguous() for part in local.split_convolve(x_BSC, weight, bias, sizes, start, halo))


def kernels_across(group, recurrences: dict[str, Callable]) -> Callable[[Tensor], Ops]:
    """Return ``ops_for`` for a block whose sequence is shared by the ranks of ``group``.

    ``recurrences``: by name in ``Ops``, functions ``(local kernels, group, ...)`` that do as their namesake does.
    """
    own = {"split_convolve": split_convolve} | recurrences

    def choose(x: Tensor) -> Ops:
        local = ops_for(x)
        return replace(local, **{name: partial(function, local, group) for name, function in own.items()})

    return choose
