"""Layout of a hybrid's caches in vLLM on a GPU: arithmetic that matches vLLM 0.26's own (docs/serving.md).

The caches of all layers have pages of one size. A recurrent state takes one page, so the state determines how many
positions a page of latents holds. Layers are put into groups of one size; a group's blocks go together.
"""

from dataclasses import dataclass

from hylo_megatron.mixers import CACHED, MIXERS
from hylo_megatron.serve.geometry import Served

_CACHED = MIXERS[CACHED[0]]  # the mixer whose cache grows with the text
ALIGNMENT = 16  # positions


@dataclass(frozen=True)
class Pages:
    """``block``: positions in a page of latents; ``page_bytes``: of one layer; ``layers``: (attention, linear)."""

    block: int
    page_bytes: int
    layers: tuple[int, int]

    @property
    def group(self) -> int:
        """Layers of a group: the larger kind's count if it is below 1.5 times the smaller one's, else the smaller."""
        counts = [count for count in self.layers if count]
        return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)

    @property
    def block_bytes(self) -> int:
        """Bytes of one block, which has a page for each layer of a group."""
        return self.group * self.page_bytes

    def blocks(self, tokens: int) -> int:
        """Blocks that one request of ``tokens`` holds."""
        attention, linear = (-(-count // self.group) for count in self.layers)
        return attention * -(-tokens // self.block) + linear

    def requests(self, cache_bytes: int, tokens: int) -> int:
        """Requests of ``tokens`` each that fit beside the one block that vLLM keeps for itself."""
        return max(0, cache_bytes // self.block_bytes - 1) // self.blocks(tokens)


def state_bytes(
    served: Served, linear: str, itemsize: int = 2, state_itemsize: int = 4, tp: int = 1, window: int = 0
) -> int:
    """Return bytes of one linear layer's state of one request on one rank.

    ``window``: values that a window beside the layer keeps there (``mixers/window.py:cached_values``).
    """
    entry = MIXERS[linear]
    conv, state = entry.part("memory").state(entry.dimensions(served.geometry))
    return (conv * itemsize + state * state_itemsize) // tp + window * itemsize


def row_bytes(served: Served, heads: int, itemsize: int = 2, tp: int = 1) -> int:
    """Return bytes of one position of one layer that caches positions, on one rank."""
    return _CACHED.part("serving").row_bytes(
        _CACHED.dimensions(served.geometry), served.expanded, heads // tp, itemsize
    )


def pages(
    served: Served,
    plan: tuple[str, ...],
    heads: int,
    itemsize: int = 2,
    state_itemsize: int = 4,
    row_itemsize: int = 2,
    tp: int = 1,
    window: int = 0,
) -> Pages:
    """Return the pages that vLLM makes for the layers of ``plan``.

    ``row_itemsize``: bytes of a value of attention's cache. The other sizes are those of ``state_bytes``.
    """
    row = row_bytes(served, heads, row_itemsize, tp)
    linear = [kind for kind in plan if MIXERS[kind].linear]
    block = ALIGNMENT
    if linear:
        state = state_bytes(served, linear[0], itemsize, state_itemsize, tp, window)
        block = ALIGNMENT * -(-state // (ALIGNMENT * row))
    return Pages(block, block * row, (len(plan) - len(linear), len(linear)))


def expanded_bytes(served: Served, heads: int, itemsize: int = 2, tp: int = 1) -> int:
    """Return bytes of the keys and values of one position, written out for every head of a rank."""
    return _CACHED.part("serving").expanded_row_bytes(_CACHED.dimensions(served.geometry), heads // tp, itemsize)
