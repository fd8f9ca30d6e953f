"""Kinds of weight mappings between Hugging Face and Megatron names. No torch at import.

A mixer's ``mapping.py`` has

    hf_shapes    shapes of a layer's tensors by Hugging Face name, without the layer's prefix
    table        the mappings of a layer, with that of the norm before the mixer

In names, ``{i}`` is the base layer. Megatron's ``HybridModel`` has two layers for it: ``{m} = 2 i`` (the mixer) and
``{p} = 2 i + 1`` (the MLP). Every mapping names all its keys on both sides, so that a table alone tells which keys
are unmapped or unused.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MEGATRON, HF = "decoder.layers.{m}.", "model.layers.{i}."

Shapes = dict[str, tuple[int, ...]]  # by Hugging Face key; those of a mixer without the layer's prefix


def _join(parts: list[Tensor], dim: int = 0) -> Tensor:
    import torch

    return torch.cat(parts, dim)


@dataclass(frozen=True)
class Mapping:
    """Tensors named ``hf`` and ``megatron`` that hold the same numbers; this base kind is a plain copy."""

    megatron: tuple[str, ...]
    hf: tuple[str, ...]

    def to_megatron(self, hf: list[Tensor]) -> list[Tensor]:
        return hf

    def to_hf(self, megatron: list[Tensor]) -> list[Tensor]:
        return megatron


@dataclass(frozen=True)
class Concat(Mapping):
    """Several HF tensors are the rows of one Megatron tensor, in order (``rows``: their sizes)."""

    rows: tuple[int, ...] = ()

    def to_megatron(self, hf):
        return [_join(hf)]

    def to_hf(self, megatron):
        return list(megatron[0].split(self.rows, 0))


@dataclass(frozen=True)
class Rows(Concat):
    """One HF tensor is the rows of several Megatron tensors, in order: ``Concat`` the other way round."""

    to_megatron, to_hf = Concat.to_hf, Concat.to_megatron


@dataclass(frozen=True)
class GroupedQKV(Mapping):
    """Megatron interleaves by key-value group: the group's queries, its key, its value."""

    heads: int = 0
    groups: int = 0
    head_dim: int = 0

    def to_megatron(self, hf):
        q, k, v = hf
        tail, per_group = q.shape[1:], self.heads // self.groups
        q = q.reshape(self.groups, per_group * self.head_dim, *tail)
        k, v = (x.reshape(self.groups, self.head_dim, *tail) for x in (k, v))
        return [_join([q, k, v], 1).reshape(-1, *tail)]

    def to_hf(self, megatron):
        tail, queries = megatron[0].shape[1:], self.heads // self.groups * self.head_dim
        groups = megatron[0].reshape(self.groups, queries + 2 * self.head_dim, *tail)
        parts = groups.split([queries, self.head_dim, self.head_dim], 1)
        return [part.reshape(-1, *tail) for part in parts]


def copy(megatron: str, hf: str) -> Mapping:
    """Return the mapping of a tensor that is the same on both sides."""
    return Mapping((megatron,), (hf,))


def copies(megatron: str, hf: str, names: dict[str, str]) -> list[Mapping]:
    """Return plain copies. ``megatron`` and ``hf``: prefixes of all ``names`` (Megatron name -> HF name)."""
    return [copy(megatron + ours, hf + theirs) for ours, theirs in names.items()]


INPUT_NORM = copy(MEGATRON + "input_layernorm.weight", HF + "input_layernorm.weight")
