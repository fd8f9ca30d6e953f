"""The gated delta rule in torch, in chunks and token by token: Gated DeltaNet (arXiv 2412.06464) and Kimi Delta
Attention (arXiv 2510.26692).

Same meaning as fla.ops.gated_delta_rule and fla.ops.kda. Legend: B batch, S sequence, M key heads, H value heads (a
multiple of M; value heads h*H/M .. share key head h), K key dim, V value dim.
"""

from collections.abc import Callable

import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.kernels.chunked import chunked_scan, recurrent_scan
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
    scan: Callable = chunked_scan,
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
    out, state = scan(q, k, v, g, beta, scale, initial_state, chunk_size)
    return out, state if output_final_state else None


def recurrent_gated_delta_rule(*inputs: Tensor, **kwargs) -> tuple[Tensor, Tensor | None]:
    """Run ``chunk_gated_delta_rule`` one token at a time."""
    return chunk_gated_delta_rule(*inputs, **kwargs, scan=recurrent_scan)


def chunk_kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, A_log=None, dt_bias=None, **kwargs):
    """Run ``chunk_gated_delta_rule`` with a log decay ``g`` [B,S,H,K].

    With ``A_log`` [H] and ``dt_bias`` [H*K], ``g`` is what ``kda_decay`` computes the log decay from.
    """
    return chunk_gated_delta_rule(q, k, v, g if A_log is None else kda_decay(g, A_log, dt_bias), beta, **kwargs)


def recurrent_kda(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor, *, A_log=None, dt_bias=None, **kwargs):
    """Run ``chunk_kda`` one token at a time."""
    return recurrent_gated_delta_rule(q, k, v, g if A_log is None else kda_decay(g, A_log, dt_bias), beta, **kwargs)
