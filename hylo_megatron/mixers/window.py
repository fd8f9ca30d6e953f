"""The window beside a linear block (``config/positions.py``): weights, and bytes of training and of a cache. No torch.

The weights are those of the base model's attention, with one more: ``gate_proj`` gives each head a factor, twice a
sigmoid of the layer's input. A window is a part of the linear block's module, under the name ``window``.
"""

from dataclasses import replace

from hylo_megatron.config import Architecture
from hylo_megatron.mixers import MIXERS
from hylo_megatron.mixers.attention import mapping as attention
from hylo_megatron.mixers.mapping import HF, INPUT_NORM, MEGATRON, Mapping, Shapes, copy

HF_NAME, GATE = "mixer.window.", "window.gate_proj.weight"
# Further ends of names of weights that every tensor-parallel rank has in full.
UNSPLIT = ("window.q_norm.weight", "window.k_norm.weight")


def _named(name: str) -> str:
    return name.replace("self_attn.", HF_NAME)


def hf_shapes(arch: Architecture, kind: str) -> Shapes:
    """Return the shapes of the window of a layer of ``kind``; none without a window."""
    if not (arch.window and MIXERS[kind].linear):
        return {}
    shapes = {_named(name): shape for name, shape in attention.hf_shapes(arch).items()}
    return shapes | {f"mixer.{GATE}": (arch.num_attention_heads, arch.hidden_size)}


def table(arch: Architecture, kind: str) -> list[Mapping]:
    """Return the mappings of the window of a layer of ``kind``; none without a window."""
    if not (arch.window and MIXERS[kind].linear):
        return []
    holder = MEGATRON + MIXERS[kind].holder
    copied = [
        replace(
            mapping,
            megatron=tuple(key.replace(f"{MEGATRON}self_attention.", f"{holder}.window.") for key in mapping.megatron),
            hf=tuple(map(_named, mapping.hf)),
        )
        for mapping in attention.table(arch)
        if mapping != INPUT_NORM
    ]
    return [*copied, copy(f"{holder}.{GATE}", f"{HF}mixer.{GATE}")]


def cached_values(arch: Architecture) -> int:
    """Return the values that all windows of a request hold, for any length of its text: keys and values."""
    rows = sum(arch.window.values()) if arch.window else 0
    layers = sum(MIXERS[kind].linear for kind in arch.plan)
    return layers * rows * MIXERS["attention"].part("memory").cached_values(arch)
