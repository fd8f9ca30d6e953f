"""FLOPs that a training step needs, by token. Recomputed activations are not counted, and no torch is imported.

A product of a token with a weight of n values takes 2n FLOPs, and as many for the gradient by its input and for the
gradient by the weight. Attention is causal. A linear block counts as its recurrence, not as the chunks that a kernel
computes. Convolutions, norms, element-wise functions and the optimizer are left out.
"""

from dataclasses import dataclass
from math import prod

from hylo_megatron.config import Architecture
from hylo_megatron.config.decisions import is_new
from hylo_megatron.config.shapes import hf_shapes
from hylo_megatron.config.stages import StageKind
from hylo_megatron.mixers import MIXERS, window

RATES = {  # FLOP/s of one bf16 product of 8192 x 8192 x 8192, by the name that torch gives a card
    "NVIDIA H100 80GB HBM3": 728e12,
    "NVIDIA H200": 794e12,
}


@dataclass(frozen=True, kw_only=True)
class TokenFlops:
    """FLOPs of one token. ``mixing``: attention's scores and values, and the recurrences of linear blocks."""

    teacher_products: float
    teacher_mixing: float
    student_products: float
    student_mixing: float

    @property
    def total(self) -> float:
        return self.teacher_products + self.teacher_mixing + self.student_products + self.student_mixing


def layer_products(arch: Architecture) -> dict[str, int]:
    """Return ``{name: values}`` of the weights of all layers that tokens are multiplied with."""
    return {key: prod(shape) for key, shape in hf_shapes(arch).items() if ".layers." in key and len(shape) == 2}


def head_products(arch: Architecture) -> int:
    return arch.vocab_size * arch.hidden_size


def mixing(arch: Architecture, length: int) -> int:
    """Return the FLOPs of a token in the mixers of all layers beside their products with weights."""
    return sum(MIXERS[kind].part("flops").mixing(arch, length) for kind in arch.plan) + window.mixing(arch, length)


def token_flops(student: Architecture, teacher: Architecture, kind: StageKind, *, train: str, length: int,
                taught: int | None = None) -> TokenFlops:  # fmt: skip
    """Return the FLOPs of a token in sequences of ``length``, of which the teacher reads the first ``taught``."""
    taught = length if taught is None else taught
    share = taught / length
    read = 2 * sum(layer_products(teacher).values())
    # Forward pass and gradient by the input; a trained weight's gradient takes as much again. Layer-wise, mixers read
    # the teacher's states and MLPs the student's.
    learnt = sum((6 if train == "all" or is_new(name) else 4) * n for name, n in layer_products(student).items())
    if not kind.layerwise:
        read += 2 * head_products(teacher)
        learnt += (6 if train == "all" else 4) * head_products(student)
    return TokenFlops(
        teacher_products=share * read, teacher_mixing=share * mixing(teacher, taught),
        student_products=learnt, student_mixing=3 * mixing(student, length),
    )  # fmt: skip
