"""Bytes of weights, gradients and optimizer states on one rank, from the names and shapes that the converter checks.

The engine (megatron-core's ``param_and_grad_buffer.py``, ``distrib_optimizer.py``) keeps for a trained bf16 parameter
2 bytes of it and 4 of its gradient on every rank, and 12 (main copy, two moments) shared out over DP x CP; an fp32
one, which is its own main copy, takes 4 + 4 and 8. Its padding (to 64 elements a tensor) is left out.
"""

from collections.abc import Callable
from dataclasses import dataclass
from math import prod

from hylo_megatron.config import Architecture
from hylo_megatron.config.plan import megatron_pattern
from hylo_megatron.convert.shapes import hf_shapes
from hylo_megatron.mixers import FP32_SUFFIXES, MIXERS

# What every tensor-parallel rank has whole; everything else is cut.
WHOLE = (
    "layernorm.weight",
    "model.norm.weight",
    *(name for entry in MIXERS.values() for name in entry.part("memory").UNSPLIT),
)
EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True)
class Weights:
    """Bytes of one rank."""

    parameters: int
    gradients: int = 0
    optimizer: int = 0


def stage_layers(arch: Architecture, pp: int) -> list[range]:
    """The layers of each pipeline stage."""
    ranges, start = [], 0
    for segment in megatron_pattern(arch.plan, pp).split("|"):
        ranges.append(range(start, start + len(segment) // 2))
        start = ranges[-1].stop
    return ranges


def _is_on(name: str, layers: range, first: bool, last: bool) -> bool:
    if name.startswith("model.layers."):
        return int(name.split(".")[2]) in layers
    return first if name == EMBEDDING else last  # the last norm and the head


def rank_elements(arch: Architecture, rows: int, tp: int, pp: int, stage: int) -> dict[str, int]:
    """``{name: elements}`` on a rank of ``stage``. ``rows``: of the vocabulary, padded. A tied head has a copy of its
    own where the embedding is on another stage."""
    shapes, last = hf_shapes(arch), stage == pp - 1
    if arch.tie_word_embeddings and pp > 1:
        shapes[HEAD] = shapes[EMBEDDING]
    elements = {}
    for name, shape in shapes.items():
        if _is_on(name, stage_layers(arch, pp)[stage], stage == 0, last):
            whole = rows * shape[1] if name in (EMBEDDING, HEAD) else prod(shape)
            elements[name] = whole if name.endswith(WHOLE) else whole // tp
    return elements


def is_new(name: str) -> bool:
    """Whether a student's tensor belongs to a new mixer; the others were copied (``distill.is_mixer_parameter``)."""
    return ".self_attn." in name or ".mixer." in name


def is_trained(stage: str, train: str) -> Callable[[str], bool]:
    """By name. ``stage``: ild or distill; ``train``: all or mixers. No loss of ild reaches what is no layer."""
    return lambda name: (stage == "distill" or ".layers." in name) and (train == "all" or is_new(name))


def weights(elements: dict[str, int], trained: Callable[[str], bool], sharers: int) -> Weights:
    """``sharers``: DP x CP, the ranks that share the optimizer's states."""
    parameters = gradients = optimizer = 0
    for name, count in elements.items():
        wide = name.endswith(FP32_SUFFIXES)
        parameters += (4 if wide else 2) * count
        if trained(name):
            gradients += 4 * count
            optimizer += (8 if wide else 12) * count
    return Weights(parameters, gradients, -(-optimizer // sharers))
