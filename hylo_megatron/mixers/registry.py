"""The registry of mixers: the names of their folders, in the order of names of plans."""

import importlib

from hylo_megatron.mixers.mixer import Mixer

FOLDERS = ("attention", "mla", "gdn", "mamba2")

MIXERS: dict[str, Mixer] = {name: importlib.import_module(f"hylo_megatron.mixers.{name}").MIXER for name in FOLDERS}
LINEAR: tuple[str, ...] = tuple(name for name, entry in MIXERS.items() if entry.linear)  # the first is the default
# Mixers of a hybrid whose cache grows with the text. Code for serving expects that there is one.
CACHED: tuple[str, ...] = tuple(name for name, entry in MIXERS.items() if entry.geometry and not entry.linear)


def mixer(name: str) -> Mixer:
    """Return the entry of ``name``."""
    return MIXERS[name]
