"""Normalisations of the last dimension with fp32 statistics, SwiGLU, and the distance of hidden states."""

import torch
import torch.nn.functional as F

ACTIVATIONS = {"silu": F.silu, "sigmoid": torch.sigmoid}


def wide(x: torch.Tensor) -> torch.Tensor:
    """Return ``x`` in fp32, or unchanged if it is fp64."""
    return x if x.dtype == torch.float64 else x.float()


def rms_norm(x: torch.Tensor, weight: torch.Tensor | None, eps: float) -> torch.Tensor:
    """Return ``x / rms(x) * weight`` over the last dimension, computed in fp32, in ``x.dtype``."""
    # a single kernel with fp32 inside, which saves x unchanged
    if x.is_cuda and (weight is None or weight.dtype == x.dtype):
        return F.rms_norm(x, x.shape[-1:], weight, eps)
    x_wide = wide(x)
    return F.rms_norm(x_wide, x.shape[-1:], None if weight is None else weight.to(x_wide.dtype), eps).to(x.dtype)


def l2norm(x: torch.Tensor, dim: int = -1, eps: float = 1e-6, **_) -> torch.Tensor:
    """Return ``x / sqrt(sum(x^2) + eps)`` as fla.modules.l2norm.l2norm does, computed in fp32, in ``x.dtype``."""
    x_wide = wide(x)
    return (x_wide * torch.rsqrt(x_wide.square().sum(dim, keepdim=True) + eps)).to(x.dtype)


def gated_rms_norm(
    x: torch.Tensor,
    z: torch.Tensor | None,
    weight: torch.Tensor,
    eps: float,
    group_size: int | None = None,
    norm_before_gate: bool = True,
    activation: str = "silu",
) -> torch.Tensor:
    """Return RMSNorm per group of ``group_size`` with a gate before or after it, as mamba_ssm's ``rmsnorm_fn`` does.

    ``activation`` of the gate: ``silu`` or ``sigmoid``.
    """
    out = wide(x)
    gate = None if z is None else ACTIVATIONS[activation](z.to(out.dtype))
    if gate is not None and not norm_before_gate:
        out = out * gate
    size = group_size or x.shape[-1]
    grouped = out.unflatten(-1, (-1, size))
    out = F.rms_norm(grouped, (size,), None, eps).flatten(-2) * weight.to(out.dtype)
    if gate is not None and norm_before_gate:
        out = out * gate
    return out.to(x.dtype)


def swiglu(gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up``."""
    return F.silu(gate) * up


def swiglu_packed(x: torch.Tensor) -> torch.Tensor:
    """Return ``silu(gate) * up`` for ``x [.., gate | up]``."""
    return swiglu(*x.chunk(2, -1))


def distance(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return ``||a - b||_2`` over the last dimension, fp32."""
    return wide(a - b).norm(dim=-1)
