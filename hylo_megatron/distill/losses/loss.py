"""``Loss``: what training, log and planner ask of every loss. No torch in here."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

    from hylo_megatron.config import Architecture


@dataclass(frozen=True, kw_only=True)
class Loss:
    """Settings of a loss. ``parts`` are the names in the log of the last entries of what the model returns.

    ``layerwise``: the outputs of each layer are compared, and every pipeline stage has the loss of its own layers.
    Otherwise the last stage computes the loss of both models' final hidden states and heads.
    """

    layerwise: ClassVar[bool]
    parts: ClassVar[tuple[str, ...]]

    @property
    def teacher_reads(self) -> int | None:
        """Number of first tokens of a sequence that the loss needs the teacher for. None: all tokens."""
        return None

    def check(
        self, student: Architecture, teacher: Architecture, pp: int, recompute: bool, prefix: str = "--hylo-"
    ) -> None:
        """Raise ``HyLoError`` if the loss cannot compare these models, or not in this pipeline.

        ``prefix``: that of ``check_levers``.
        """

    def token_counts(self, mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        """Number of tokens that each part is a sum over. ``mask`` is the loss mask."""
        return dict.fromkeys(self.parts, mask.sum().float())
