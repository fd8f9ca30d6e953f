"""Tensors of all context-parallel ranks, given to each rank a few ranks' at a time while they arrive.

A rank's own tensor comes first, so what is done with it hides the sending. Two ways:

- ``Gather``: one all-gather, kept for the backward pass; gradients go home by one reduce-scatter.
- ``Ring``: each rank passes on what it has, and never holds more than two ranks' tensors. In the backward pass the
  tensors go round once more, and their gradients (fp32) travel behind them.

Legend: n ranks; m ranks whose tensors are given together; ``..`` a rank's tensor.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from hylo_megatron.config import decisions
from hylo_megatron.kernels.chunked import compute_dtype

Arrival = tuple[range, Tensor]  # ranks, and their tensors [m,..]


@dataclass(frozen=True)
class StandIn:
    """A process group without processes: by default of one rank."""

    number: int = 0
    count: int = 1

    def rank(self) -> int:
        return self.number

    def size(self) -> int:
        return self.count


class Gather:
    """Gathers all tensors at once; ``together``: of how many ranks at most are given together."""

    def __init__(self, group, together: int):
        self.group, self.together = group, together
        self.gradients = None

    def _others(self, everyone: Tensor) -> Iterator[Arrival]:
        """Yield ranks before this one, then ranks after it."""
        rank, size = self.group.rank(), self.group.size()
        for ranks in (range(rank), range(rank + 1, size)):
            for first in ranks[:: self.together]:
                some = range(first, min(first + self.together, ranks.stop))
                yield some, everyone[some.start : some.stop]

    def arrivals(self, mine: Tensor) -> Iterator[Arrival]:
        mine, rank = mine.contiguous(), self.group.rank()
        self.kept = mine.new_empty(self.group.size(), *mine.shape)
        work = dist.all_gather_into_tensor(self.kept.flatten(0, 1), mine, group=self.group, async_op=True)
        yield range(rank, rank + 1), mine[None]
        work.wait()
        yield from self._others(self.kept)

    def arrivals_again(self, kept: Tensor) -> Iterator[Arrival]:
        """Yield what ``arrivals`` did; each ``gradient`` is expected before the next one is asked for."""
        rank = self.group.rank()
        self.gradients = torch.empty_like(kept)
        yield range(rank, rank + 1), kept[rank : rank + 1]
        yield from self._others(kept)

    def gradient(self, ranks: range, d_tensors: Tensor) -> None:
        """Take this rank's part of the gradient of the tensors of ``ranks``."""
        self.gradients[ranks.start : ranks.stop] = d_tensors

    def total(self) -> Tensor:
        """Return the gradient of this rank's tensor, summed over all ranks."""
        mine = torch.empty_like(self.gradients[0])
        dist.reduce_scatter_tensor(mine, self.gradients.flatten(0, 1), group=self.group)
        return mine


class Ring:
    """Passes tensors to the next rank while the current ones are used. See ``Gather`` for its methods."""

    def __init__(self, group):
        ranks = dist.get_process_group_ranks(group)
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.next, self.previous = (ranks[(self.rank + step) % self.size] for step in (1, -1))
        self.travelling: Callable[[], Tensor] | None = None

    def _start(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Send ``tensor`` to the next rank. The result, when called, waits for the previous rank's tensor."""
        tensor, received = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, tensor, self.next, self.group),
            dist.P2POp(dist.irecv, received, self.previous, self.group),
        ])  # fmt: skip

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return received

        return wait

    def arrivals(self, mine: Tensor) -> Iterator[Arrival]:
        self.kept = held = mine
        for step in range(self.size):
            coming = self._start(held) if step < self.size - 1 else None
            source = (self.rank - step) % self.size
            yield range(source, source + 1), held[None]
            held = coming() if coming else held

    def arrivals_again(self, kept: Tensor) -> Iterator[Arrival]:
        self.travelling = None
        yield from self.arrivals(kept)

    def gradient(self, ranks: range, d_tensors: Tensor) -> None:
        """Add to the gradient that travels behind the current tensor, and send the sum one step further."""
        d_held = d_tensors[0].to(compute_dtype(d_tensors))
        self.travelling = self._start(d_held + (self.travelling() if self.travelling else 0.0))

    def total(self) -> Tensor:
        return self.travelling()


def exchange(group, mode: str | None, held: int, made: int) -> Gather | Ring:
    """Return what exchanges tensors of ``held`` bytes, of each of which ``made`` bytes are made.

    ``mode``: --cp-comm-type.
    """
    if decisions.goes_round(mode, group.size(), held):
        return Ring(group)
    return Gather(group, max(1, decisions.GATHERED // max(1, made)))
