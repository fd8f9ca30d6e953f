"""The processes of torchrun that share the work of a selection."""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """``rank`` of ``size``. One process without torchrun is rank 0 of 1."""

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def share(self, work: list) -> list:
        """Return this rank's part of the work."""
        return work[self.rank :: self.size]

    def joined(self, values: dict) -> dict:
        """Return the values of all ranks."""
        if self.size == 1:
            return values
        parts: list = [None] * self.size
        dist.all_gather_object(parts, values)
        return {key: value for part in parts for key, value in part.items()}

    def from_first(self, value: Any) -> Any:
        """Return rank 0's value."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box)
        return box[0]

    def device(self, name: str) -> str:
        """Return the device of this rank for the device that the user asked for."""
        if self.size > 1 and name in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
        return name


@contextlib.contextmanager
def ranks() -> Iterator[Ranks]:
    """Yield the ranks of this run; under torchrun with a group of gloo around them."""
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        yield Ranks()
        return
    dist.init_process_group("gloo")
    try:
        yield Ranks(rank=dist.get_rank(), size=size)
    finally:
        dist.destroy_process_group()
