"""Mamba-2's state-space duality scan (arXiv 2405.21060) in torch: in chunks, and token by token.

Legend: B batch, S sequence, H heads, P head dim, G groups (heads g*H/G .. share B and C), N state. States are
[B,H,P,N] as in mamba_ssm.
"""

import torch
import torch.nn.functional as F

from hylo_megatron.kernels.chunked import chunked_scan, compute_dtype
from hylo_megatron.kernels.conv import causal_conv1d
from hylo_megatron.kernels.norm import gated_rms_norm


def _skip(out: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None) -> torch.Tensor:
    if D is None:
        return out
    return out + x.to(out.dtype) * (D if D.dim() == 2 else D[:, None]).to(out.dtype)


def ssd_chunk_scan(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    chunk_size: int = 64,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """x [B,S,H,P], dt [B,S,H] (after softplus), A [H] (negative), B, C [B,S,G,N], D [H] or [H,P]
    -> y [B,S,H,P] in x.dtype, last state [B,H,P,N] or None."""
    dtype = compute_dtype(x, dt, A, B, C)
    dt = dt.to(dtype)
    state = None if initial_state is None else initial_state.mT
    out, state = chunked_scan(C, B, x * dt.unsqueeze(-1), dt * A.to(dtype), None, 1.0, state, chunk_size)
    return _skip(out, x, D).to(x.dtype), state.mT if output_final_state else None


def recurrent_ssd(
    x: torch.Tensor,
    dt: torch.Tensor,
    A: torch.Tensor,
    B: torch.Tensor,
    C: torch.Tensor,
    D: torch.Tensor | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """``ssd_chunk_scan`` one token at a time: for decoding, and the reference in tests."""
    dtype = compute_dtype(x, dt, A, B, C)
    batch, length, heads, head_dim = x.shape
    dt = dt.to(dtype)
    B, C = (t.to(dtype).repeat_interleave(heads // t.shape[2], 2) for t in (B, C))
    decay, write = (dt * A.to(dtype)).exp(), x.to(dtype) * dt.unsqueeze(-1)
    state = write.new_zeros(batch, heads, head_dim, B.shape[-1]) if initial_state is None else initial_state.to(dtype)
    outs = []
    for t in range(length):
        state = state * decay[:, t, :, None, None] + write[:, t, :, :, None] * B[:, t, :, None, :]
        outs.append(torch.einsum("bhpn,bhn->bhp", state, C[:, t]))
    return _skip(torch.stack(outs, 1), x, D).to(x.dtype), state if output_final_state else None


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
    **_,
):
    """Drop-in for mamba_ssm's function: zxbcdt [B,S,z|x|B|C|dt] -> y [B,S,H*P] (and states if asked).

    Without ``rmsnorm_weight`` the result is gated by silu(z) and not normed (megatron's mixer norms it afterwards);
    with it, norm and gate are applied here, per group.
    """
    if seq_idx is not None:
        raise NotImplementedError("packed sequences (seq_idx) need mamba_ssm on a GPU; pass one sequence a row")
    heads = D.shape[0]
    headdim = D.shape[1] if D.dim() == 2 else headdim
    inner = heads * headdim
    bc = (zxbcdt.shape[-1] - 2 * inner - heads) // 2
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * bc, heads], -1)
    xbc, _ = causal_conv1d(xbc, conv1d_weight, conv1d_bias, activation)
    x, B, C = xbc.split([inner, bc, bc], -1)
    dt = F.softplus(dt.to(compute_dtype(dt)) + dt_bias).clamp(*dt_limit)
    y, states = ssd_chunk_scan(
        x.unflatten(-1, (heads, headdim)),
        dt,
        A,
        B.unflatten(-1, (ngroups, -1)),
        C.unflatten(-1, (ngroups, -1)),
        # mamba_ssm's chunk of 256 fits its GPU kernel; in torch the [C, C] products of larger chunks only cost time.
        min(chunk_size, 64),
        D,
        initial_states,
        return_final_states,
    )
    y = y.flatten(-2)
    if rmsnorm_weight is None:
        y = (y.to(dt.dtype) * F.silu(z.to(dt.dtype))).to(zxbcdt.dtype)
    else:
        y = gated_rms_norm(y, z, rmsnorm_weight, rmsnorm_eps, inner // ngroups, norm_before_gate)
    if outproj_weight is not None:
        y = F.linear(y, outproj_weight, outproj_bias)
    return (y, states) if return_final_states else y
