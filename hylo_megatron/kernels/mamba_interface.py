"""Replacements, over ``kernels.ops``, of two names of mamba-ssm that megatron-core's Mamba-2 mixer calls."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylo_megatron.kernels.choose import Ops, ops_for
from hylo_megatron.kernels.chunked import compute_dtype


def mamba_split_conv1d_scan_combined(
    zxbcdt: Tensor,
    conv1d_weight: Tensor,
    conv1d_bias: Tensor | None,
    dt_bias: Tensor,
    A: Tensor,
    D: Tensor,
    chunk_size: int,
    *,
    seq_idx: Tensor | None = None,
    activation: str = "silu",
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    state_dtype: torch.dtype | None = None,
    kernels: Callable[[Tensor], Ops] = ops_for,
) -> Tensor:
    """Compute mamba_ssm's function with the arguments that megatron-core gives: zxbcdt [B,S,z|x|B|C|dt|..] -> y.

    y [B,S,H*P] is gated by silu(z) and not normalised, because megatron-core's mixer normalises afterwards.
    ``norm_before_gate`` and ``state_dtype`` are not read. ``kernels``: the source of convolution and scan.
    """
    if seq_idx is not None:
        raise NotImplementedError("packed sequences (seq_idx) need mamba_ssm on a GPU; pass one sequence a row")
    if activation not in ("silu", "swish"):
        raise ValueError(f"mamba_split_conv1d_scan_combined: activation {activation!r}, expected silu")
    heads = D.shape[0]
    inner = heads * (D.shape[1] if D.dim() == 2 else headdim)
    bc, run = (len(conv1d_weight) - inner) // 2, kernels(zxbcdt)
    sizes = (inner, inner, bc, bc, heads)
    z, x, B, C, dt = run.split_convolve(zxbcdt, conv1d_weight, conv1d_bias, sizes, start=inner)
    dt = F.softplus(dt.to(compute_dtype(dt)) + dt_bias)
    x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, heads), (B, ngroups), (C, ngroups)))
    # mamba_ssm's chunk of 256 suits its GPU kernel; in torch the [C, C] products of larger chunks only cost time.
    y, _ = run.chunk_ssd(x, dt, A, B, C, min(chunk_size, 64), D)
    return run.swiglu(z, y.flatten(-2))


class RMSNormGated(nn.Module):
    """Replacement of ``mamba_ssm.ops.triton.layernorm_gated.RMSNorm``."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: Tensor, z: Tensor | None = None) -> Tensor:
        return ops_for(x).gated_rms_norm(x, z, self.weight, self.eps, self.group_size, self.norm_before_gate)
