"""How attention within a window is cut into blocks of queries (``kernels/window.py``). No torch."""

from typing import NamedTuple

ALIGNMENT = 16  # keys of a block: fused kernels read masks in aligned rows


class Blocks(NamedTuple):
    """``count`` blocks of ``length`` queries. ``before``: keys of a block ahead of its first query's own key.

    ``keys`` of a block are these, those of its queries, and the sinks.
    """

    count: int
    length: int
    before: int
    keys: int


def blocks(queries: int, window: int, sinks: int) -> Blocks:
    length = min(window, queries)
    keys = sinks + window - 1 + length
    keys += -keys % ALIGNMENT
    return Blocks(-(-queries // length), length, keys - sinks - length, keys)
