"""Mamba-2's state-space duality scan (arXiv 2405.21060) in torch: in chunks, and token by token.

Legend: B batch, S sequence, H heads, P head dim, G groups (heads g*H/G .. share B and C), N state. States are
[B,H,P,N] as in mamba_ssm.
"""

import torch

from hylo_megatron.kernels.chunked import chunked_scan, compute_dtype


def skip(out: torch.Tensor, x: torch.Tensor, D: torch.Tensor | None) -> torch.Tensor:
    """Return ``out + x D``, with D [H] or [H,P]."""
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
    """Run the scan in chunks.

    x [B,S,H,P], dt [B,S,H] (after softplus), A [H] (negative), B, C [B,S,G,N], D [H] or [H,P] -> y [B,S,H,P] in
    x.dtype, last state [B,H,P,N] or None.
    """
    dtype = compute_dtype(x, dt, A, B, C)
    dt = dt.to(dtype)
    state = None if initial_state is None else initial_state.mT
    out, state = chunked_scan(C, B, x * dt.unsqueeze(-1), dt * A.to(dtype), None, 1.0, state, chunk_size)
    return skip(out, x, D).to(x.dtype), state.mT if output_final_state else None


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
    """Run ``ssd_chunk_scan`` one token at a time: for decoding, and as the reference in tests."""
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
    return skip(torch.stack(outs, 1), x, D).to(x.dtype), state if output_final_state else None
