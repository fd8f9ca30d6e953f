"""``LayerDistance``: enhanced intermediate-layer distillation (section "Stage 1" of the method's paper)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hylo_megatron.distill.losses.loss import Loss
from hylo_megatron.flags import weight
from hylo_megatron.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from hylo_megatron.config import Architecture


@dataclass(frozen=True, kw_only=True)
class LayerDistance(Loss):
    """Euclidean distance to the teacher of each mixer's output and of the hidden state after each layer."""

    layerwise = True
    parts = ("ild attention", "ild hidden")
    values_kept = 4  # bf16 values a token that stay for the backward pass of a layer: two fp32 distances

    raw_norms: bool = option("--hylo-ild-raw-norms", False, help="do not divide layer losses by the teacher's norms")
    attention_weight: float = option("--hylo-ild-attention-weight", 1.0, weight, "weight of the mixers' outputs")
    hidden_weight: float = option("--hylo-ild-hidden-weight", 1.0, weight, "weight of the hidden states after layers")

    @property
    def weights(self) -> tuple[float, ...]:
        """Weight of each part in the loss."""
        return self.attention_weight, self.hidden_weight

    def norms(self, arch: Architecture) -> list[list[float]]:
        """Divisor of each part, a row for each layer."""
        ones = [[1.0, 1.0]] * arch.num_layers
        return ones if self.raw_norms else arch.extra.get("ild_norms", ones)

    def __call__(self, layers: Sequence, teacher_states: list[Tensor], mask_SB: Tensor, norms_LP: Tensor) -> Tensor:
        """Return ``[L, P]``: for each layer, the sum over tokens of each part (see ``layer_losses``)."""
        from hylo_megatron.distill.ild import layer_losses

        return layer_losses(layers, teacher_states, mask_SB, norms_LP)
