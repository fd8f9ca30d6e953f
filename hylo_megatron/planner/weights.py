"""Bytes of weights, gradients and optimizer states on one rank, from the names and shapes of the converter.

megatron-core (``param_and_grad_buffer.py``, ``distrib_optimizer.py``) keeps 2 bytes of a trained bf16 parameter and
4 bytes of its gradient on every rank, and shares 12 bytes (main copy, two moments) among DP x CP ranks. An fp32
parameter is its own main copy: 4 + 4 bytes on every rank, and 8 shared. megatron's padding to 64 elements a tensor is
left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from hylo_megatron.config import Architecture
from hylo_megatron.config.shapes import hf_shapes
from hylo_megatron.mixers import FP32_SUFFIXES, MIXERS, window

# Parameters that every tensor-parallel rank has whole; all others are split.
_UNSPLIT = (name for entry in MIXERS.values() for name in entry.part("memory").UNSPLIT)
WHOLE = ("layernorm.weight", "model.norm.weight", *_UNSPLIT, *window.UNSPLIT)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Bytes on one rank."""

    parameters: int
    gradients: int = 0
    optimizer: int = 0


@dataclass(frozen=True, kw_only=True)
class Shards:
    """Share of a model on one rank. ``rows``: rows of embedding and head on all ranks, with padding."""

    rows: int
    tp: int
    pp: int
    pipeline_stage: int

    @property
    def first(self) -> bool:
        return self.pipeline_stage == 0

    @property
    def last(self) -> bool:
        return self.pipeline_stage == self.pp - 1

    def has(self, name: str, layers: range) -> bool:
        """Return whether the parameter ``name`` is on this pipeline stage, whose layers are ``layers``."""
        if name.startswith("model.layers."):
            return int(name.split(".")[2]) in layers
        return self.first if name == EMBEDDING else self.last  # the final norm and the head


def rank_elements(arch: Architecture, shards: Shards) -> dict[str, int]:
    """Return ``{name: elements}`` of one rank. A tied head is a second copy if the embedding is on another stage."""
    shapes, layers = hf_shapes(arch), arch.plan.stages(shards.pp)[shards.pipeline_stage]
    if arch.tie_word_embeddings and shards.pp > 1:
        shapes[HEAD] = shapes[EMBEDDING]
    elements = {}
    for name, shape in shapes.items():
        if shards.has(name, layers):
            whole = shards.rows * shape[1] if name in (EMBEDDING, HEAD) else prod(shape)
            elements[name] = whole if name.endswith(WHOLE) else whole // shards.tp
    return elements


def weights(elements: dict[str, int], trained: Callable[[str], bool], sharers: int) -> Weights:
    """Return the bytes of ``elements``. ``sharers``: DP x CP, the ranks that share the optimizer's states."""
    parameters = gradients = optimizer = 0
    for name, count in elements.items():
        fp32 = name.endswith(FP32_SUFFIXES)
        parameters += (4 if fp32 else 2) * count
        if trained(name):
            gradients += 4 * count
            optimizer += (8 if fp32 else 12) * count
    return Weights(parameters=parameters, gradients=gradients, optimizer=-(-optimizer // sharers))
