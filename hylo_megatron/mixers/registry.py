"""The registry of mixers: the names of their folders, in the order of names of plans."""

import importlib

from hylo_megatron.mixers.mixer import Mixer

FOLDERS = ("attention", "mla", "gdn", "mamba2", "kda")

MIXERS: dict[str, Mixer] = {name: importlib.import_module(f"hylo_megatron.mixers.{name}").MIXER for name in FOLDERS}
LINEAR: tuple[str, ...] = tuple(name for name, entry in MIXERS.items() if entry.linear)  # the first is the default
# Mixers of a hybrid whose cache grows with the text. Code for serving expects that there is one.
CACHED: tuple[str, ...] = tuple(name for name, entry in MIXERS.items() if entry.geometry and not entry.linear)

# Modules of a layer that hold its mixer, in Megatron and in Hugging Face checkpoints. A mixer's parameters are told by
# the last two parts of their names.
HOLDERS = ("self_attention", "self_attn", "mixer")
# Of a window beside a linear block, whose other parameters are copies of the base model's.
WINDOW, WINDOW_GATE = ".window.", ".window.gate_proj."


def _suffixes(field: str) -> tuple[str, ...]:
    last = dict.fromkeys(name for entry in MIXERS.values() for name in getattr(entry, field))
    return tuple(f".{holder}.{name}" for holder in HOLDERS for name in last)


FP32_SUFFIXES = _suffixes("fp32")  # of parameters that stay fp32 in a 16-bit model, Megatron's names or Hugging Face's
FAST_SUFFIXES = _suffixes("fast")  # of those that learn at --hylo-decay-lr-mult times the rate
