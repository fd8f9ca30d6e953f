"""How the engine lays out the caches of a hybrid on a GPU: arithmetic that matches vLLM 0.26's own (docs/serving.md).

All layers' caches have pages of one size, a recurrent state takes one page, so the state sets how many positions a
page of latents holds. Layers are put into groups of one size; a group's blocks go together.
"""

from dataclasses import dataclass

from hylo_megatron.serve.geometry import Served

ALIGNMENT = 16  # positions


@dataclass(frozen=True)
class Pages:
    """``block``: positions in a page of latents; ``page_bytes``: of one layer; ``layers``: (attention, linear)."""

    block: int
    page_bytes: int
    layers: tuple[int, int]

    @property
    def group(self) -> int:
        """The larger kind's layers where that is not much more than the smaller's: less padding, vLLM says."""
        counts = [count for count in self.layers if count]
        return max(counts) if max(counts) < 1.5 * min(counts) else min(counts)

    @property
    def block_bytes(self) -> int:
        """Of one block: a page for each layer of a group."""
        return self.group * self.page_bytes

    def blocks(self, tokens: int) -> int:
        """That one request of ``tokens`` holds."""
        attention, linear = (-(-count // self.group) for count in self.layers)
        return attention * -(-tokens // self.block) + linear

    def requests(self, cache_bytes: int, tokens: int) -> int:
        """Requests of ``tokens`` each that fit; vLLM keeps one block for itself."""
        return max(0, cache_bytes // self.block_bytes - 1) // self.blocks(tokens)


def state_bytes(served: Served, linear: str, itemsize: int = 2, state_itemsize: int = 4, tp: int = 1) -> int:
    """One linear layer's state of one request on one rank: the convolution's window and the recurrent state."""
    if linear == "mamba2":
        m = served.geometry.mamba2
        channels = m.num_heads * m.head_dim + 2 * m.num_groups * m.state_size
        state, taps = m.num_heads * m.head_dim * m.state_size, m.conv_kernel
    else:
        g = served.geometry.gdn
        channels = 2 * g.num_key_heads * g.key_head_dim + g.num_value_heads * g.value_head_dim
        state, taps = g.num_value_heads * g.key_head_dim * g.value_head_dim, g.conv_kernel
    return (channels * (taps - 1) * itemsize + state * state_itemsize) // tp


def row_bytes(served: Served, heads: int, itemsize: int = 2, tp: int = 1) -> int:
    """One position of one MLA layer on one rank: latents are on every rank, expanded heads are shared out."""
    if served.expanded:
        return 2 * (heads // tp) * served.expanded * itemsize
    return (served.geometry.mla.kv_lora_rank + served.geometry.mla.qk_rope_head_dim) * itemsize


def pages(served: Served, plan: tuple[str, ...], heads: int, itemsize=2, state_itemsize=4, tp=1) -> Pages:
    row, attention = row_bytes(served, heads, itemsize, tp), sum(kind == "mla" for kind in plan)
    linear = next((kind for kind in plan if kind != "mla"), None)
    block = ALIGNMENT
    if linear:
        state = state_bytes(served, linear, itemsize, state_itemsize, tp)
        block = ALIGNMENT * -(-state // (ALIGNMENT * row))
    return Pages(block, block * row, (attention, len(plan) - attention))


def expanded_bytes(served: Served, heads: int, itemsize: int = 2, tp: int = 1) -> int:
    """Keys and values of one position, written out for every head of a rank."""
    mla = served.geometry.mla
    return (heads // tp) * (mla.qk_nope_head_dim + mla.v_head_dim) * itemsize
