"""``Mixer``: what the rest of the package has to know about a token mixer. No torch in here."""

import importlib
from dataclasses import dataclass
from types import ModuleType

from hylo_megatron.errors import HyLoError


@dataclass(frozen=True, kw_only=True)
class BaseHeads:
    """The attention of a base model, from which geometry presets are made."""

    hidden_size: int
    num_heads: int
    head_dim: int


@dataclass(frozen=True, kw_only=True)
class Mixer:
    """An entry of the registry.

    ``name`` stands in ``hylo.json``, ``config.json`` and flags, ``short`` in names of plans such as 4MLA12GDN,
    ``title`` in messages. ``symbol`` is the layer's letter in megatron-core's pattern of a hybrid model and ``slot``
    the layer that the letter stands for in its ``HybridStackSubmodules``; mixers with the same letter cannot be in one
    model. ``geometry`` is the dataclass of the dimensions (None: those of the base model).
    """

    name: str
    short: str
    title: str
    symbol: str
    slot: str
    geometry: type | None = None
    linear: bool = False  # a state of fixed size in place of a cache that grows with the text
    aliases: tuple[str, ...] = ()  # further spellings of ``short`` in names of plans
    fp32: tuple[str, ...] = ()  # parameters that stay fp32 in a 16-bit model, by their last name
    fast: tuple[str, ...] = ()  # parameters that learn at --hylo-decay-lr-mult times the rate
    heads: tuple[str, str] = ("", "")  # (title, geometry field): what TP, and CP by all-to-all, must divide
    rotary: str = ""  # of linear blocks: the geometry field with the head size of queries and keys that can rotate
    multiples: tuple[tuple[str, str], ...] = ()  # geometry fields (many, few): many must be a multiple of few

    @property
    def module(self) -> str:
        """Name of the layer in exported models: ``model.layers.N.<module>.*``."""
        return "mixer" if self.linear else "self_attn"

    @property
    def holder(self) -> str:
        """Name of the mixer in megatron-core's layer: ``decoder.layers.N.<holder>.*``."""
        return "mixer" if self.slot == "mamba_layer" else "self_attention"

    def part(self, file: str) -> ModuleType:
        """Import a file of this mixer's folder, such as ``hf_module``."""
        return importlib.import_module(f"hylo_megatron.mixers.{self.name}.{file}")

    def dimensions(self, geometry):
        """Return this mixer's part of a model's ``Geometry``. Raises ``HyLoError`` where it is missing."""
        found = getattr(geometry, self.name, None)
        if found is None:
            raise HyLoError(f"geometry has no {self.name!r}: expected the dimensions of {self.title}; upcycle again")
        return found
