"""Mamba-2's state-space duality scan (arXiv 2405.21060) in torch: in chunks, and token by token.

Legend: B batch, S sequence, H heads, P head dim, G groups (heads g*H/G .. share B and C), N state. States are
[B,H,P,N] as in mamba_ssm.
"""

from collections.abc import Callable

from torch import Tensor

from hylo_megatron.kernels.chunked import chunked_scan, compute_dtype, recurrent_scan


def skip(out: Tensor, x: Tensor, D: Tensor | None) -> Tensor:
    """Return ``out + x D``, with D [H] or [H,P]."""
    if D is None:
        return out
    return out + x.to(out.dtype) * (D if D.dim() == 2 else D[:, None]).to(out.dtype)


def ssd_chunk_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    chunk_size: int = 64,
    D: Tensor | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    scan: Callable = chunked_scan,
) -> tuple[Tensor, Tensor | None]:
    """Run the scan in chunks.

    x [B,S,H,P], dt [B,S,H] (after softplus), A [H] (negative), B, C [B,S,G,N], D [H] or [H,P] -> y [B,S,H,P] in
    x.dtype, last state [B,H,P,N] or None.
    """
    dtype = compute_dtype(x, dt, A, B, C)
    dt = dt.to(dtype)
    state = None if initial_state is None else initial_state.mT
    out, state = scan(C, B, x * dt.unsqueeze(-1), dt * A.to(dtype), None, 1.0, state, chunk_size)
    return skip(out, x, D).to(x.dtype), state.mT if output_final_state else None


def recurrent_ssd(x, dt, A, B, C, D=None, initial_state=None, output_final_state=False):
    """Run ``ssd_chunk_scan`` one token at a time."""
    return ssd_chunk_scan(x, dt, A, B, C, 1, D, initial_state, output_final_state, recurrent_scan)
