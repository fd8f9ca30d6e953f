"""The registry of mixers: the names of their folders, in the order of names of plans."""

import importlib

from hylo_megatron.mixers.mixer import Mixer

FOLDERS = ("attention", "mla", "gdn", "mamba2")

MIXERS: dict[str, Mixer] = {name: importlib.import_module(f"hylo_megatron.mixers.{name}").MIXER for name in FOLDERS}
LINEAR: tuple[str, ...] = tuple(name for name, entry in MIXERS.items() if entry.linear)  # the first is the default


def mixer(name: str) -> Mixer:
    """Return the entry of ``name``."""
    return MIXERS[name]
