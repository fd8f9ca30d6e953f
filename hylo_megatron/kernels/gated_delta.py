"""The gated delta rule (Gated DeltaNet, arXiv 2412.06464) in torch: in chunks, and token by token.

Same meaning as fla.ops.gated_delta_rule. Legend: B batch, S sequence, M key heads, H value heads (a multiple of M;
value heads h*H/M .. share key head h), K key dim, V value dim.
"""

import torch
import torch.nn.functional as F

from hylo_megatron.kernels.chunked import chunked_scan, compute_dtype
from hylo_megatron.kernels.norm import l2norm, wide


def log_decay(a: torch.Tensor, A_log: torch.Tensor, dt_bias: torch.Tensor) -> torch.Tensor:
    """Return the logarithm of the decay, ``-exp(A_log) * softplus(a + dt_bias)``, in fp32 or fp64."""
    return -wide(A_log).exp() * F.softplus(wide(a) + wide(dt_bias))


def chunk_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    chunk_size: int = 64,
    cu_seqlens: torch.Tensor | None = None,
    **_,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run the rule in chunks.

    q, k [B,S,M,K]; v [B,S,H,V]; g (log decay) and beta [B,S,H] -> o [B,S,H,V], last state [B,H,K,V] or None.
    """
    if cu_seqlens is not None:
        raise NotImplementedError("packed sequences (cu_seqlens) need fla's kernel on a GPU; pass one sequence a row")
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    out, state = chunked_scan(q, k, v, g, beta, scale, initial_state, chunk_size)
    return out, state if output_final_state else None


def recurrent_gated_delta_rule(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    g: torch.Tensor,
    beta: torch.Tensor,
    scale: float | None = None,
    initial_state: torch.Tensor | None = None,
    output_final_state: bool = False,
    use_qk_l2norm_in_kernel: bool = False,
    **_,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Run ``chunk_gated_delta_rule`` one token at a time: for decoding, and as the reference in tests."""
    if use_qk_l2norm_in_kernel:
        q, k = l2norm(q), l2norm(k)
    dtype = compute_dtype(q, k, v, g)
    groups = v.shape[2] // q.shape[2]
    q_BSHK = q.to(dtype).repeat_interleave(groups, 2) * (q.shape[-1] ** -0.5 if scale is None else scale)
    k_BSHK = k.to(dtype).repeat_interleave(groups, 2)
    v_BSHV, decay_BSH, beta_BSH = v.to(dtype), g.to(dtype).exp(), beta.to(dtype)
    batch, length, heads, key_dim = q_BSHK.shape
    if initial_state is None:
        state_BHKV = v_BSHV.new_zeros(batch, heads, key_dim, v.shape[-1])
    else:
        state_BHKV = initial_state.to(dtype)
    outs = []
    for t in range(length):
        state_BHKV = state_BHKV * decay_BSH[:, t, :, None, None]
        seen_BHV = torch.einsum("bhk,bhkv->bhv", k_BSHK[:, t], state_BHKV)
        u_BHV = (v_BSHV[:, t] - seen_BHV) * beta_BSH[:, t, :, None]
        state_BHKV = state_BHKV + k_BSHK[:, t, :, :, None] * u_BHV[:, :, None, :]
        outs.append(torch.einsum("bhk,bhkv->bhv", q_BSHK[:, t], state_BHKV))
    return torch.stack(outs, 1).to(v.dtype), state_BHKV if output_final_state else None
