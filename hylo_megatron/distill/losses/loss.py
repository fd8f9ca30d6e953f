"""``Loss``: what training, log and planner ask of a loss. No torch in here."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from hylo_megatron.config import Architecture
    from hylo_megatron.distill.head import HeadInputs


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Settings of a loss. ``parts`` are the names in the log of the last entries of what the model returns."""

    layerwise: ClassVar[bool]
    parts: ClassVar[tuple[str, ...]]

    @property
    def teacher_reads(self) -> int | None:
        """Number of first tokens of a sequence that the loss needs the teacher for. None: all tokens."""
        return None

    def check(self, student: Architecture, teacher: Architecture, pp: int, recompute: bool) -> None:
        """Raise ``HyLoError`` if the loss cannot compare these models, or not in this pipeline."""

    def token_counts(self, mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        """Number of tokens that each part is a sum over. ``mask`` is the loss mask."""
        return dict.fromkeys(self.parts, mask.sum().float())


class LayerLoss(Loss):
    """A loss that compares the outputs of each layer; every pipeline stage has the loss of its own layers.

    ``values_kept`` is the planner's: bf16 values a token that the comparisons of a layer keep for the backward pass.
    """

    layerwise = True
    values_kept: ClassVar[int]

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each part in the loss."""
        raise NotImplementedError

    def norms(self, arch: Architecture) -> list[list[float]]:
        """Divisor of each part, a row for each layer."""
        raise NotImplementedError

    def __call__(self, layers: Sequence, teacher_states: list[Tensor], mask_SB: Tensor, norms_LP: Tensor) -> Tensor:
        """Return ``[L, P]``: for each layer, the sum over tokens of each part. ``teacher_states[j]`` enters
        ``layers[j]``; two of these, a mixer and an MLP, make one layer of the plan."""
        raise NotImplementedError


class HeadLoss(Loss):
    """A loss that the last pipeline stage computes of both models' final hidden states and heads."""

    layerwise = False
    ce_from: ClassVar[float] = 0.0  # see ``KL``
    hidden_layers_weight: ClassVar[float] = 0.0

    @property
    def distances(self) -> dict[str, float]:
        """Weights of the distances between hidden states that are added to the loss, by their names in the log."""
        return {}

    def __call__(self, inputs: HeadInputs) -> Tensor:
        """Return one sum over tokens for each of ``parts``, of which the first is ``loss``."""
        raise NotImplementedError

    def memory(self, shape: HeadShape) -> int:
        """Bytes at the peak of this loss, beside weights and activations of the layers."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Sizes that the memory of a ``HeadLoss`` follows from, on one rank. All tensors are bf16 unless said."""

    tokens: int
    taught: int  # tokens that the teacher has read
    rows: int  # of the heads: vocabulary of a tensor-parallel rank, with padding
    width: int  # hidden size of the student
    teacher_width: int
    tp: int = 1
    sequence_parallel: bool = False
    head_trained: bool = True
