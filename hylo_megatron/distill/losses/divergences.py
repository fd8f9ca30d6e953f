"""Divergences of logits beside the forward KL: ``ReverseKL`` and ``JSD``.

Legend: T tokens, N vocabulary rows of a tensor-parallel rank. ``log_s`` and ``log_t`` are ``[T, N]``.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hylo_megatron.distill.losses.kl import KL
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import share
from hylo_megatron.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from hylo_megatron.distill.head import Shard


@dataclass(frozen=True, kw_only=True)
class ReverseKL(KL):
    """``KL`` with ``--hylo-reverse-kl``, under a name that ``--hylo-loss`` and a recipe can give."""

    def __post_init__(self):
        super().__post_init__()
        object.__setattr__(self, "reverse", True)


@dataclass(frozen=True, kw_only=True)
class JSD(KL):
    """Generalised Jensen-Shannon divergence (arXiv 2306.13649), with cross-entropy as in ``KL``.

    With the mixture ``m = beta · teacher + (1 - beta) · student`` it is ``beta · KL(teacher || m) + (1 - beta) ·
    KL(student || m)``. Divided by ``beta (1 - beta)`` it approaches the forward KL for small ``beta`` and the reverse
    KL for large ``beta``.
    """

    parts = ("loss", "jsd", "ce")
    fp32_tensors = 10

    beta: float = option("--hylo-jsd-beta", 0.5, share, "weight of the teacher in the mixture of --hylo-loss jsd")

    def __post_init__(self):
        super().__post_init__()
        if not 0 < self.beta < 1:
            raise HyLoError(
                f"--hylo-jsd-beta {self.beta}: expected a number between 0 and 1; --hylo-loss kl is a limit"
            )
        if self.reverse:
            raise HyLoError("--hylo-reverse-kl does not apply to --hylo-loss jsd: swap the roles by --hylo-jsd-beta")

    def divergence(self, log_s: Tensor, log_t: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        import torch

        log_m = torch.logaddexp(log_t + math.log(self.beta), log_s + math.log1p(-self.beta))
        p_s = log_s.exp()
        from_s = (log_s - log_m).nan_to_num_(0.0)  # -inf - -inf in padded columns
        of_s = (p_s * from_s).sum(-1)
        of_t = (log_t.exp() * (log_t - log_m).nan_to_num_(0.0)).sum(-1)
        of_s, of_t = shard.sum(torch.stack([of_s, of_t])).unbind()
        gradient = p_s.mul_(from_s.sub_(of_s[:, None])).mul_(1 - self.beta)
        return self.beta * of_t + (1 - self.beta) * of_s, gradient
