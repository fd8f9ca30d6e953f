"""The window beside a mixer (``config/positions.py``): weights, and bytes of training and of a cache. No torch.

The weights are those of the base model's attention, with one more: ``gate_proj`` gives each head a factor, twice a
sigmoid of the layer's input. A window is a part of the mixer's module, under the name ``window``.
"""

from collections.abc import Sequence
from dataclasses import replace

from hylo_megatron.config import Architecture
from hylo_megatron.config.positions import has_window, window_rows
from hylo_megatron.config.window import Blocks, blocks
from hylo_megatron.mixers import MIXERS
from hylo_megatron.mixers.attention import mapping as attention
from hylo_megatron.mixers.mapping import HF, INPUT_NORM, MEGATRON, Mapping, Shapes, copy
from hylo_megatron.mixers.memory import Share, SubLayer, aligned
from hylo_megatron.mixers.sent import ELEMENT, Exchange, Passes

GATE = "window.gate_proj.weight"
# Further ends of names of weights that every tensor-parallel rank has in full.
UNSPLIT = ("window.q_norm.weight", "window.k_norm.weight")


def hf_name(name: str, kind: str) -> str:
    """Return the name in a window beside the mixer ``kind`` of the base model's weight ``name``."""
    return name.replace("self_attn.", f"{MIXERS[kind].module}.window.")


def hf_shapes(arch: Architecture, kind: str) -> Shapes:
    """Return the shapes of the window of a layer of ``kind``; none without a window."""
    if not has_window(arch.window, kind):
        return {}
    shapes = {hf_name(name, kind): shape for name, shape in attention.hf_shapes(arch).items()}
    return shapes | {f"{MIXERS[kind].module}.{GATE}": (arch.num_attention_heads, arch.hidden_size)}


def table(arch: Architecture, kind: str) -> list[Mapping]:
    """Return the mappings of the window of a layer of ``kind``; none without a window."""
    if not has_window(arch.window, kind):
        return []
    holder = MEGATRON + MIXERS[kind].holder
    copied = [
        replace(
            mapping,
            megatron=tuple(key.replace(f"{MEGATRON}self_attention.", f"{holder}.window.") for key in mapping.megatron),
            hf=tuple(hf_name(name, kind) for name in mapping.hf),
        )
        for mapping in attention.table(arch)
        if mapping != INPUT_NORM
    ]
    return [*copied, copy(f"{holder}.{GATE}", f"{HF}{MIXERS[kind].module}.{GATE}")]


def key_heads(heads: int, ranks: int) -> int:
    """Return the key heads of a window on one tensor-parallel rank in vLLM, which repeats heads that are too few."""
    return max(1, heads // ranks)


def holders(
    plan: Sequence[str], window: dict | None, stages: Sequence[range] | None = None
) -> dict[int, tuple[int, int]]:
    """Return for each layer with a window the linear layer whose states in vLLM hold its keys and values, and a place.

    A linear layer has its own in place 0. Windows of MLA layers share out the linear layers of their pipeline stage,
    so that all have the same number of places; each takes the nearest that is free. ``stages``: the layers of each
    (default: one stage has all). Windows in a stage without linear layers are left out.
    """
    found = {}
    for stage in stages or [range(len(plan))]:
        linear = [layer for layer in stage if MIXERS[plan[layer]].linear]
        others = [layer for layer in stage if layer not in linear and has_window(window, plan[layer])]
        found |= {layer: (layer, 0) for layer in linear}
        most, taken = -(-len(others) // max(1, len(linear))), dict.fromkeys(linear, 0)
        for layer in others if linear else ():
            holder = min((other for other in linear if taken[other] < most), key=lambda other: abs(other - layer))
            taken[holder] += 1
            found[layer] = holder, taken[holder]
    return found


def places_of(plan: Sequence[str], window: dict | None, stages: Sequence[range] | None = None) -> int:
    """Return how many windows the states of a linear layer hold in vLLM, which gives all stages the same states."""
    return 1 + max((place for _, place in holders(plan, window, stages).values()), default=0) if window else 0


def cached_values(arch: Architecture, ranks: int = 1, stages: Sequence[range] | None = None) -> int:
    """Return the values of windows that the states of a linear layer hold in vLLM, on one tensor-parallel rank.

    ``arch`` may be an exported model's configuration. ``stages``: those of ``holders``.
    """
    plan = arch.plan if isinstance(arch, Architecture) else arch.mixers
    rows = places_of(plan, arch.window, stages) * window_rows(arch.window)
    return 2 * rows * key_heads(arch.num_key_value_heads, ranks) * arch.head_dim


def mixing(arch: Architecture, length: int) -> int:
    """Return the FLOPs of a token in all windows beside products with weights: scores and values of seen tokens.

    The first tokens of a sequence see fewer than a full window.
    """
    most = min(window_rows(arch.window), length)
    seen = most - most**2 // (2 * length)
    return 4 * seen * _layers(arch) * arch.num_attention_heads * arch.head_dim


def computed(arch: Architecture, length: int, ranks: int = 1) -> int:
    """Return what the kernel computes for ``mixing``: scores twice as wide, and values, of all keys of a block.

    ``ranks`` share a sequence of ``length``.
    """
    keys = _cut(arch, length // ranks, ranks).keys if arch.window else 0
    return 6 * keys * _layers(arch) * arch.num_attention_heads * arch.head_dim


def _layers(arch: Architecture) -> int:
    return sum(has_window(arch.window, kind) for kind in arch.plan)


def beside(block: SubLayer, arch: Architecture, at: Share, frozen: bool = False) -> SubLayer:
    """Return the bytes of a mixer together with its window.

    Kept are queries, rotated twice, with keys of the same width and values in blocks, the output as the kernel returns
    it and by token, with fp32 denominators, gates in fp32 and bf16, the product of both, and the gate's weight with
    the zeros that align it. The output by token is a part of that of complete blocks, but chunks of a rank are joined.
    ``frozen``: only the gate learns, and nothing learns from the layer's input. Then the output and the gate in fp32
    are kept, and the rest is only there in the forward pass.
    """
    h, g, k = arch.num_attention_heads // at.layout.tp, arch.num_key_value_heads // at.layout.tp, arch.head_dim
    cut = _cut(arch, at.length, at.layout.cp)
    padded, keys = cut.count * cut.length / at.length, cut.count * cut.keys / at.length
    by_token = padded if at.layout.cp == 1 else 1
    weight = 2 * aligned(h) * arch.hidden_size if h % 16 else 0
    kept = at.inner(padded * (3 * h * k + 2 * h) + by_token * h * k + 3 * keys * g * k + h * k + 3 * h) + weight
    if frozen:
        gated = at.inner(by_token * h * k + 2 * h) + weight
        return SubLayer(block.kept + gated, max(block.work, kept - gated), block.entry)
    work = at.inner(3 * padded * h * k + 6 * keys * g * k)
    return SubLayer(block.kept + kept, max(block.work, work), block.entry)


def exchange(arch: Architecture, at: Share) -> Exchange:
    """Return what the ranks that share a window send each other (``parallel/halo.py``).

    The bytes of the halo are the mean of all ranks, whose chunks must not be shorter than the window. The query, key
    and value projection is copied from the base model, the gate's is new.
    """
    ranks, d = at.layout.cp, arch.hidden_size
    keys_and_values = 2 * arch.num_key_value_heads * arch.head_dim / at.layout.tp
    moved = at.sequences * (2 * (arch.window["size"] - 1) + arch.window["sinks"])
    halo = (ranks - 1) / ranks * moved * keys_and_values * ELEMENT
    return Exchange(columns=d, copied=d, rows=d, waited=Passes(forward=halo, backward=halo))


def tables(arch: Architecture, at: Share) -> int:
    """Return bytes that all windows share: cosines and sines, those for sinks too, and the mask of a row."""
    cut, shared = _cut(arch, at.length, at.layout.cp), arch.num_attention_heads // arch.num_key_value_heads
    return 8 * at.length * arch.head_dim + 2 * cut.count * shared * cut.length * cut.keys


def _cut(arch: Architecture, length: int, ranks: int) -> Blocks:
    """Return the blocks of the ``length`` tokens of one sequence that a rank has, in two chunks if ranks share it."""
    chunks = 2 if ranks > 1 else 1
    cut = blocks(length // chunks, arch.window["size"], min(arch.window["sinks"], ranks * length))
    return cut._replace(count=chunks * cut.count)
