"""Kimi Delta Attention (arXiv 2510.26692) in torch: in chunks, and token by token.

A delta rule whose state decays in each key channel at a rate of its own: per head, with ``a_t = exp(g_t)``,

    u_t = beta_t (v_t - k_t^T Diag(a_t) S_(t-1))
    S_t = Diag(a_t) S_(t-1) + k_t u_t^T        o_t = scale q_t^T S_t

Same meaning as fla.ops.kda. Legend: B batch, S sequence, H heads, K key dim, V value dim.
"""

import torch
from torch import Tensor

from hylo_megatron.kernels.chunked import compute_dtype
from hylo_megatron.kernels.gated_delta import log_decay
from hylo_megatron.kernels.kda_chunks import chunked_kda
from hylo_megatron.kernels.norm import l2norm


def kda_decay(raw_BSHK: Tensor, A_log_H: Tensor, dt_bias_HK: Tensor) -> Tensor:
    """Return the log decay ``-exp(A_log) softplus(raw + dt_bias)``, fp32; ``dt_bias`` has H*K values."""
    return log_decay(raw_BSHK, A_log_H.unsqueeze(-1), dt_bias_HK.view(raw_BSHK.shape[-2:]))


def chunk_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """q, k [B,S,H,K]; v [B,S,H,V]; g [B,S,H,K]; beta [B,S,H] -> o [B,S,H,V], last state [B,H,K,V] or None.

    ``g`` is the log decay; with ``A_log`` [H] and ``dt_bias`` [H*K] it is what ``kda_decay`` makes the log decay from.
    """
    if cu_seqlens is not None:
        raise NotImplementedError("packed sequences (cu_seqlens) need fla's kernel on a GPU; pass one sequence a row")
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    if A_log is not None:
        g = kda_decay(g, A_log, dt_bias)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, state = chunked_kda(q, k, v, g, beta, scale=scale, initial_state=initial_state, chunk_size=chunk_size)
    return out, state if output_final_state else None


def recurrent_kda(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    *,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """``chunk_kda`` one token at a time: for decoding, and the reference in tests."""
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    if A_log is not None:
        g = kda_decay(g, A_log, dt_bias)
    dtype = compute_dtype(q, k, v, g)
    q_BSHK = q.to(dtype) * (q.shape[-1] ** -0.5 if scale is None else scale)
    k_BSHK, v_BSHV, decay_BSHK, beta_BSH = k.to(dtype), v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    batch, length, heads, key_dim = q.shape
    if initial_state is None:
        state_BHKV = v_BSHV.new_zeros(batch, heads, key_dim, v.shape[-1])
    else:
        state_BHKV = initial_state.to(dtype)
    outs = []
    for t in range(length):
        state_BHKV = state_BHKV * decay_BSHK[:, t].unsqueeze(-1)
        seen_BHV = torch.einsum("bhk,bhkv->bhv", k_BSHK[:, t], state_BHKV)
        u_BHV = (v_BSHV[:, t] - seen_BHV) * beta_BSH[:, t].unsqueeze(-1)
        state_BHKV = state_BHKV + k_BSHK[:, t].unsqueeze(-1) * u_BHV.unsqueeze(-2)
        outs.append(torch.einsum("bhk,bhkv->bhv", q_BSHK[:, t], state_BHKV))
    return torch.stack(outs, 1).to(v.dtype), state_BHKV if output_final_state else None
