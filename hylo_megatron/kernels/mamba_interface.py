"""Replacements, over ``kernels.ops``, of two names of the mamba-ssm package that megatron-core's Mamba-2 mixer
calls.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from hylo_megatron.kernels.choose import Ops, ops_for
from hylo_megatron.kernels.chunked import compute_dtype


def mamba_split_conv1d_scan_combined(
    zxbcdt: torch.Tensor,
    conv1d_weight: torch.Tensor,
    conv1d_bias: torch.Tensor | None,
    dt_bias: torch.Tensor,
    A: torch.Tensor,
    D: torch.Tensor,
    chunk_size: int,
    initial_states: torch.Tensor | None = None,
    seq_idx: torch.Tensor | None = None,
    dt_limit: tuple[float, float] = (0.0, float("inf")),
    return_final_states: bool = False,
    activation: str = "silu",
    rmsnorm_weight: torch.Tensor | None = None,
    rmsnorm_eps: float = 1e-6,
    outproj_weight: torch.Tensor | None = None,
    outproj_bias: torch.Tensor | None = None,
    headdim: int | None = None,
    ngroups: int = 1,
    norm_before_gate: bool = True,
    kernels: Callable[[torch.Tensor], Ops] = ops_for,
    **_,
):
    """Compute mamba_ssm's function: zxbcdt [B,S,z|x|B|C|dt|...] -> y [B,S,H*P] (and states if requested).

    Without ``rmsnorm_weight`` the result is gated by silu(z) and not normalised (megatron-core's mixer normalises
    afterwards). With the weight, norm and gate are applied here, per group. ``kernels``: the source of convolution and
    scan.
    """
    if seq_idx is not None:
        raise NotImplementedError("packed sequences (seq_idx) need mamba_ssm on a GPU; pass one sequence a row")
    if activation not in ("silu", "swish"):
        raise ValueError(f"mamba_split_conv1d_scan_combined: activation {activation!r}, expected silu")
    heads = D.shape[0]
    headdim = D.shape[1] if D.dim() == 2 else headdim
    inner = heads * headdim
    bc = (len(conv1d_weight) - inner) // 2
    run = kernels(zxbcdt)
    sizes = (inner, inner, bc, bc, heads)
    z, x, B, C, dt = run.split_convolve(zxbcdt, conv1d_weight, conv1d_bias, sizes, start=inner)
    dt = F.softplus(dt.to(compute_dtype(dt)) + dt_bias).clamp(*dt_limit)
    y, states = run.chunk_ssd(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        # mamba_ssm's chunk of 256 suits its GPU kernel; in torch the [C, C] products of larger chunks only cost time.
        min(chunk_size, 64),
        D,
        initial_states,
        return_final_states,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is None:
        y = run.swiglu(z, y)
    else:
        y = run.gated_rms_norm(y, z, rmsnorm_weight, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y


class RMSNormGated(nn.Module):
    """Replacement of ``mamba_ssm.ops.triton.layernorm_gated.RMSNorm``."""

    def __init__(self, hidden_size, eps=1e-5, group_size=None, norm_before_gate=True, device=None, dtype=None):
        super().__init__()
        self.eps, self.group_size, self.norm_before_gate = eps, group_size, norm_before_gate
        self.weight = nn.Parameter(torch.ones(hidden_size, device=device, dtype=dtype))
        self.register_parameter("bias", None)

    def reset_parameters(self) -> None:
        nn.init.ones_(self.weight)

    def forward(self, x: torch.Tensor, z: torch.Tensor | None = None) -> torch.Tensor:
        return ops_for(x).gated_rms_norm(x, z, self.weight, self.eps, self.group_size, self.norm_before_gate)
