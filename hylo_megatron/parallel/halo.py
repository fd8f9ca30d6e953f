"""Tokens of other ranks that a window reads: those before each of a rank's chunks, and the first of the sequence.

One all-to-all sends exactly these tokens, and one all-to-all returns their gradients. A rank also sends itself
what it needs of its own tokens (a copy), so that everything arrives in one tensor. Computation between the start of an
exchange and its end hides it; in the backward pass autograd runs the gradients of the same computation meanwhile.

Legend: L tokens of a rank in two chunks of C (``zigzag.py``), B rows, G, Y further dimensions, R tokens that arrive.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from hylo_megatron.kernels.chunked import compute_dtype
from hylo_megatron.parallel.zigzag import chunk_starts

FIRST = 2  # of what a rank needs: 0 and 1 are the tokens before its chunks


class Piece(NamedTuple):
    """Tokens of one chunk that a rank needs. ``owner`` holds them as its ``tokens``."""

    need: int
    position: int
    owner: int
    tokens: slice

    @property
    def length(self) -> int:
        return self.tokens.stop - self.tokens.start


@dataclass(frozen=True, kw_only=True)
class Reach:
    """How many tokens a rank needs ``before`` each of its chunks, and how many ``first`` ones of the sequence.

    ``ranks`` share a sequence and have ``length`` tokens each. A rank alone needs nothing before its only chunk.
    """

    ranks: int
    length: int
    before: int
    first: int

    @classmethod
    def of_window(cls, size: int, sinks: int, ranks: int, length: int) -> "Reach":
        """Return what a window of ``size`` tokens and ``sinks`` reads; not more than a sequence has."""
        before = min(size - 1, ranks * length - length // 2) if ranks > 1 else 0
        return cls(ranks=ranks, length=length, before=before, first=min(sinks, ranks * length))

    def pieces(self, rank: int) -> list[Piece]:
        """Return what ``rank`` needs, in the order in which it arrives."""
        starts = chunk_starts(self.length, self.ranks, rank)
        spans = [range(max(0, start - self.before), start) for start in starts]
        spans.append(range(self.first))
        found = [piece for need, span in enumerate(spans) for piece in self._owned(need, span)]
        return sorted(found, key=lambda piece: piece.owner)

    def _owned(self, need: int, span: range) -> Iterator[Piece]:
        """Yield the parts of a span of positions, one for each chunk."""
        chunk, position = self.length // 2, span.start
        while position < span.stop:
            index = position // chunk
            owner, start = (index, 0) if index < self.ranks else (2 * self.ranks - 1 - index, chunk)
            start += position % chunk
            length = min(span.stop, (index + 1) * chunk) - position
            yield Piece(need, position, owner, slice(start, start + length))
            position += length


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One rank's part of the exchange: which tokens go out, what comes in, and how many for and from each rank."""

    outgoing: tuple[slice, ...]
    incoming: tuple[Piece, ...]
    sent: list[int]
    received: list[int]


@lru_cache(maxsize=64)
def plan(reach: Reach, rank: int) -> Plan:
    to = [[piece for piece in reach.pieces(other) if piece.owner == rank] for other in range(reach.ranks)]
    incoming = reach.pieces(rank)
    return Plan(
        outgoing=tuple(piece.tokens for pieces in to for piece in pieces),
        incoming=tuple(incoming),
        sent=[sum(piece.length for piece in pieces) for pieces in to],
        received=[sum(p.length for p in incoming if p.owner == other) for other in range(reach.ranks)],
    )


class _Exchange:
    """The all-to-all of one layer and pass, while it is under way."""

    def __init__(self, group, plan: Plan):
        self.group, self.plan, self.pending = group, plan, None

    def start(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Send ``x``. The result has its values after ``end``."""
        arriving = x.new_empty(sum(received), *x.shape[1:])
        work = dist.all_to_all_single(arriving, x, received, sent, group=self.group, async_op=True)
        self.pending = work, arriving, x
        return arriving

    def end(self) -> Tensor:
        work, arriving, _ = self.pending
        work.wait()
        self.pending = None
        return arriving


class _Send(torch.autograd.Function):
    """``[L, ..] -> [R, ..]``, on its way. The backward pass takes the gradients that ``_Arrive`` has sent home."""

    @staticmethod
    def forward(ctx, x_L, exchange: _Exchange):
        ctx.exchange, ctx.length = exchange, len(x_L)
        sent = torch.cat([x_L[:0], *(x_L[tokens] for tokens in exchange.plan.outgoing)])
        return exchange.start(sent, exchange.plan.sent, exchange.plan.received)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, _):
        outgoing, home = ctx.exchange.plan.outgoing, ctx.exchange.end()
        same: dict[tuple[int, int], list[Tensor]] = {}  # of the first tokens every rank has a gradient
        for tokens, part in zip(outgoing, home.split([t.stop - t.start for t in outgoing]), strict=True):
            same.setdefault((tokens.start, tokens.stop), []).append(part)
        d_L = home.new_zeros(ctx.length, *home.shape[1:])
        for (start, stop), parts in same.items():
            d_L[start:stop] += torch.stack(parts).sum(0, dtype=compute_dtype(home))
        return d_L, None


class _Arrive(torch.autograd.Function):
    """``[R, ..]`` unchanged, once it is there. The backward pass starts the gradients' way home."""

    @staticmethod
    def forward(ctx, x_R, exchange: _Exchange):
        ctx.exchange = exchange
        exchange.end()
        return x_R.view_as(x_R)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_R):
        made = ctx.exchange.plan
        ctx.exchange.start(d_R.contiguous(), made.received, made.sent)
        return d_R, None


def with_halo(x_LBGY: Tensor, reach: Reach, group) -> Callable[[], tuple[Tensor, Tensor]]:
    """Start to fetch what chunks need. The result, when called, waits for it.

    Then there are ``[2B, before + C, G, Y]``, chunks (``zigzag.to_rows``) behind the tokens before them, with zeros
    where the sequence has none, and ``[2B, first, G, Y]``, the first tokens of the sequence. With one rank, which has
    complete sequences, they are ``[B, L, G, Y]`` and ``[B, first, G, Y]``.
    """
    own = x_LBGY.transpose(0, 1)
    if reach.ranks == 1:
        return lambda: (own, own[:, : reach.first])
    made = plan(reach, group.rank())
    exchange = _Exchange(group, made)
    coming_RBGY = _Send.apply(x_LBGY, exchange)

    def wait() -> tuple[Tensor, Tensor]:
        arrived = _Arrive.apply(coming_RBGY, exchange).transpose(0, 1)
        parts = zip(made.incoming, arrived.split([piece.length for piece in made.incoming], 1), strict=True)
        needs = [[], [], []]
        for piece, part in sorted(parts, key=lambda pair: pair[0].position):
            needs[piece.need].append(part)
        rows = []
        for earlier, chunk in zip(needs[:FIRST], own.chunk(2, 1), strict=True):
            missing = reach.before - sum(part.shape[1] for part in earlier)
            rows.append(torch.cat([own.new_zeros(len(own), missing, *own.shape[2:]), *earlier, chunk], 1))
        return torch.cat(rows), torch.cat([arrived[:, :0], *needs[FIRST]], 1).repeat(2, 1, 1, 1)

    return wait
