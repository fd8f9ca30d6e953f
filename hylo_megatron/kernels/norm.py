"""Normalisations with fp32 statistics. Legend: last dimension is normalised."""

import torch
import torch.nn.functional as F
from torch import nn


def _wide(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """``x / rms(x) * weight`` over the last dimension, computed in fp32, returned in ``x.dtype``."""
    wide = _wide(x)
    return F.rms_norm(wide, x.shape[-1:], None if weight is None else weight.to(wide.dtype), eps).to(x.dtype)


def l2norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6, **_) -> torch.Tensor:
    """``x / sqrt(sum(x^2) + eps)``, as fla.modules.l2norm.l2norm; computed in fp32, returned in ``x.dtype``."""
    wide = _wide(x)
    return (wide * torch.rsqrt(wide.square().sum(dim, keepdim=True) + eps)).to(x.dtype)


def gated_rms_norm(
    x: torch.Tensor,
    z: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = True,
) -> torch.Tensor:
    """RMSNorm per group of ``group_size`` and a SiLU gate, before or after it, as mamba_ssm's ``rmsnorm_fn``."""
    wide = _wide(x)
    gate = None if z is None else F.silu(z.to(wide.dtype))
    if gate is not None and not norm_before_gate:
        wide = wide * gate
    size = group_size or x.shape[-1]
    grouped = wide.unflatten(-1, (-1, size))
    wide = F.rms_norm(grouped, (size,), None, eps).flatten(-2) * weight.to(wide.dtype)
    if gate is not None and norm_before_gate:
        wide = wide * gate
    return wide.to(x.dtype)


class RMSNormGated(nn.Module):
    """Drop-in for ``mamba_ssm.ops.triton.layernorm_gated.RMSNorm``."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        return gated_rms_norm(x, z, self.weight, self.eps, self.group_size, self.norm_before_gate)
