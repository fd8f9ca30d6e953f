"""Counts of what this rank sends to others: calls and bytes of each kind of collective and each process group.

The methods of ``ProcessGroup`` are replaced while a profile of steps is taken (``step_profile.py``). The bytes are
those that each rank sends in a ring of all ranks. NCCL may choose another way.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable
from functools import partial

from torch import Tensor

from hylo_megatron.engine.patch import around, entries


def _bytes(tensors) -> int:
    """Return the bytes of a tensor, or of tensors in lists of any depth."""
    if isinstance(tensors, Tensor):
        return tensors.numel() * tensors.element_size()
    return sum(map(_bytes, tensors)) if isinstance(tensors, Iterable) else 0


def _part(ranks: int) -> float:
    return (ranks - 1) / ranks


# by method: the kind, which argument is counted, and by how much its bytes are multiplied on n ranks
_METHODS: dict[str, tuple[str, int, Callable[[int], float]]] = {
    **dict.fromkeys(("allreduce", "allreduce_coalesced"), ("all-reduce", 0, lambda n: 2 * (n - 1) / n)),
    **dict.fromkeys(
        ("allgather", "allgather_coalesced", "_allgather_base", "allgather_into_tensor_coalesced",
         "all_gather_single", "all_gather_single_coalesced"),
        ("all-gather", 1, lambda n: n - 1),
    ),
    **dict.fromkeys(
        ("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_tensor_coalesced", "reduce_scatter_single",
         "reduce_scatter_single_coalesced"),
        ("reduce-scatter", 1, _part),
    ),
    **dict.fromkeys(("alltoall", "alltoall_base", "all_to_all_single"), ("all-to-all", 1, _part)),
    "broadcast": ("broadcast", 0, _part),
    "send": ("send", 0, lambda n: 1),
}  # fmt: skip


class Sent:
    """Calls and bytes by ``(kind, group)``."""

    def __init__(self):
        self.calls: dict[tuple[str, str], int] = defaultdict(int)
        self.bytes: dict[tuple[str, str], float] = defaultdict(float)

    def add(self, kind: str, group, sent: float) -> None:
        if group.size() > 1:
            key = kind, group.group_desc or group.group_name
            self.calls[key] += 1
            self.bytes[key] += sent

    def table(self, steps: int) -> list[dict]:
        """Return a row for each kind and group, of one of ``steps``; the largest first."""
        rows = [
            {"collective": key[0], "group": key[1], "calls": self.calls[key] / steps, "bytes": round(sent / steps)}
            for key, sent in self.bytes.items()
        ]
        return sorted(rows, key=lambda row: -row["bytes"])


def _share(method: str, given: list, group) -> float:
    """Return by how much the bytes of the counted argument are multiplied. ``given``: all arguments."""
    splits = given[3] if method in ("alltoall_base", "all_to_all_single") and len(given) > 3 else None
    if splits:  # uneven: all but this rank's own part
        return 1 - splits[group.rank()] / max(1, sum(splits))
    return _METHODS[method][2](group.size())


def _counted(method: str) -> Callable:
    kind, which, _ = _METHODS[method]

    @around
    def counted(original, counts: Sent, group, *args, **kwargs):
        given = [*args, *kwargs.values()]
        counts.add(kind, group, _bytes(given[which]) * _share(method, given, group))
        return original(group, *args, **kwargs)

    return counted


def _exists(method: str) -> bool:
    from torch.distributed import ProcessGroup

    return hasattr(ProcessGroup, method)


PATCHES = tuple(
    patch
    for method in _METHODS
    for patch in entries(
        "counting", "torch",
        (f"torch.distributed:ProcessGroup.{method}", _counted(method), "builtin",
         "a profile of steps counts the bytes that a rank sends"),
        needed=partial(_exists, method),
    )
)  # fmt: skip
