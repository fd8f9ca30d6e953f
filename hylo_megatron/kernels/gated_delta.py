"""The gated delta rule in torch, in chunks and token by token: Gated DeltaNet (arXiv 2412.06464) and Kimi Delta
Attention (arXiv 2510.26692).

Same meaning as fla.ops.gated_delta_rule and fla.ops.kda. Legend: B batch, S sequence, M key heads, H value heads (a
multiple of M; value heads h*H/M .. share key head h), K key dim, V value dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.kernels.chunked import chunked_scan, compute_dtype
from hylo_megatron.kernels.norm import l2norm, wide


def log_decay(a: Tensor, A_log: Tensor, dt_bias: Tensor) -> Tensor:
    """Return the logarithm of the decay, ``-exp(A_log) * softplus(a + dt_bias)``, in fp32 or fp64."""
    return -wide(A_log).exp() * F.softplus(wide(a) + wide(dt_bias))


def kda_decay(raw_BSHK: Tensor, A_log_H: Tensor, dt_bias_HK: Tensor) -> Tensor:
    """Return ``log_decay`` of each key channel; ``dt_bias`` has H*K values."""
    return log_decay(raw_BSHK, A_log_H.unsqueeze(-1), dt_bias_HK.view(raw_BSHK.shape[-2:]))


def chunk_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    chunk_size: int = 64,
    cu_seqlens: Tensor | None = None,
    **_,
) -> tuple[Tensor, Tensor | None]:
    """Run the rule in chunks.

    q, k [B,S,M,K]; v [B,S,H,V]; g (log decay) [B,S,H], or [B,S,H,K] for a decay of each key channel; beta [B,S,H] -> o
    [B,S,H,V], last state [B,H,K,V] or None.
    """
    if cu_seqlens is not None:
        raise NotImplementedError("packed sequences (cu_seqlens) need fla's kernel on a GPU; pass one sequence a row")
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, state = chunked_scan(q, k, v, g, beta, scale, initial_state, chunk_size)
    return out, state if output_final_state else None


def recurrent_gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor,
    scale: float | None = None,
    initial_state: Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_,
) -> tuple[Tensor, Tensor | None]:
    """Run ``chunk_gated_delta_rule`` one token at a time: for decoding, and as the reference in tests."""
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    dtype, groups = compute_dtype(q, k, v, g), v.shape[2] // q.shape[2]
    q_BSHK = q.to(dtype).repeat_interleave(groups, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    k_BSHK, v_BSHV = k.to(dtype).repeat_interleave(groups, 2), v.to(dtype)
    decay_BSHK = (g if g.dim() == 4 else g.unsqueeze(-1)).to(dtype).exp()
    beta_BSH1 = beta.to(dtype).unsqueeze(-1)
    if initial_state is None:
        state_BHKV = v_BSHV.new_zeros(len(v), v.shape[2], k.shape[-1], v.shape[-1])
    else:
        state_BHKV = initial_state.to(dtype)
    outs = []
    for t in range(v.shape[1]):
        state_BHKV = state_BHKV * decay_BSHK[:, t].unsqueeze(-1)
        seen_BHV = torch.einsum("bhk,bhkv->bhv", k_BSHK[:, t], state_BHKV)
        u_BHV = (v_BSHV[:, t] - seen_BHV) * beta_BSH1[:, t]
        state_BHKV = state_BHKV + k_BSHK[:, t].unsqueeze(-1) * u_BHV.unsqueeze(-2)
        outs.append(torch.einsum("bhk,bhkv->bhv", q_BSHK[:, t], state_BHKV))
    return torch.stack(outs, 1).to(v.dtype), state_BHKV if output_final_state else None


def chunk_kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, A_log=None, dt_bias=None, **kwargs):
    """Run ``chunk_gated_delta_rule`` with a log decay ``g`` [B,S,H,K].

    With ``A_log`` [H] and ``dt_bias`` [H*K], ``g`` is what ``kda_decay`` computes the log decay from.
    """
    return chunk_gated_delta_rule(q, k, v, g if A_log is None else kda_decay(g, A_log, dt_bias), beta, **kwargs)


def recurrent_kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, A_log=None, dt_bias=None, **kwargs):
    """Run ``chunk_kda`` one token at a time: for decoding, and as the reference in tests."""
    return recurrent_gated_delta_rule(q, k, v, g if A_log is None else kda_decay(g, A_log, dt_bias), beta, **kwargs)
