"""A gated linear recurrence, with or without the delta rule: in chunks, forward and backward by hand, and token by
token.

Per head, with a decay ``a_t = exp(g_t)`` that is one number, or one for each key channel, the recurrence is

    S_t = Diag(a_t) S_(t-1) + k_t u_t^T        o_t = scale S_t^T q_t
    u_t = beta_t (v_t - S_(t-1)^T Diag(a_t) k_t)      (delta rule: Gated DeltaNet, Kimi Delta Attention)
    u_t = v_t                                         (no delta rule: Mamba-2's SSD)

Within a chunk this is a masked product (``chunk.py``). The delta rule adds one triangular system for each chunk (the
WY form of "Gated Delta Networks", arXiv 2412.06464). One chunk is computed at a time, so that its temporaries stay in
the processor's cache. For the backward pass only the states, ``u`` and the inverse of the triangular system are kept.

Shapes: B batch, S sequence, M key heads, H value heads (H/M share a key head), K key dim, V value dim; decays have
1 or K channels. Inside a chunk: C positions, and batch x heads in one dimension, M or H.
"""

import torch
from torch import Tensor

from hylo_megatron.kernels.chunk import Chunk, chunk_of


def compute_dtype(*tensors: Tensor) -> torch.dtype:
    """Return fp32, or fp64 if an input is fp64: recurrences are never computed with less."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def spans(length: int, size: int) -> list[slice]:
    """Return the slices of ``size`` that make up ``length``; the last one may be shorter."""
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


def _unit_lower_inverse(strict_HCC: Tensor) -> Tensor:
    """Return the inverse of ``I + strict`` for strictly lower triangular ``strict``."""
    eye_CC = torch.eye(strict_HCC.shape[-1], dtype=strict_HCC.dtype, device=strict_HCC.device)
    return torch.linalg.solve_triangular(strict_HCC, eye_CC.expand_as(strict_HCC), upper=False, unitriangular=True)


class _ChunkedScan(torch.autograd.Function):
    """(q, k [B,S,M,K], v [B,S,H,V], g [B,S,H,1|K], beta [B,S,H]|None, state [B*H,K,V]) -> (o like v, last state)."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, scale, size):
        out, kept = torch.empty_like(v, memory_format=torch.contiguous_format), []
        for span in spans(v.shape[1], size):
            x = chunk_of(span, q, k, v, g, beta, scale, state.dtype)
            inverse, u = None, x.v
            if beta is not None:
                inverse = _unit_lower_inverse(x.system * x.beta)
                u = inverse @ torch.baddbmm(x.v, x.key_head, state, alpha=-1).mul_(x.beta)
            kept += [state, u, inverse]
            x.put(torch.baddbmm(x.scores @ u, x.query_head, state), out)
            state = torch.baddbmm(state * x.end, x.key_tail.mT, u)
        ctx.scale, ctx.size = scale, size
        ctx.save_for_backward(q, k, v, g, beta, *kept)
        ctx.set_materialize_grads(False)
        return out, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_state):
        inputs = (saved := ctx.saved_tensors)[:5]  # read only once, as activation recompute requires
        kept = saved[5:]
        d_inputs = [t if t is None else torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
        d_out = torch.zeros_like(inputs[2]) if d_out is None else d_out
        d_state = torch.zeros_like(kept[0]) if d_state is None else d_state
        parts = spans(d_out.shape[1], ctx.size)
        for i in reversed(range(len(parts))):
            x = chunk_of(parts[i], *inputs, ctx.scale, d_state.dtype)
            *d_chunk, d_state = _chunk_backward(x, *kept[3 * i : 3 * i + 3], x.take(d_out), d_state)
            d_chunk[0] *= ctx.scale
            for d_part, d_whole in zip(d_chunk, d_inputs, strict=True):
                if d_whole is not None:
                    x.put(d_part, d_whole)
        return *d_inputs, d_state, None, None


def _chunk_backward(x: Chunk, state, u, inverse, d_out, d_after):
    """Return gradients of (q, k, v, g, beta, state before the chunk), given those of the output and of the state after
    it.

    ``d_cum`` is the gradient of the cumulated log decay. Reading the state before the chunk has cum_i as its exponent,
    writing the state after the chunk cum_C - cum_i.
    """
    d_u = torch.baddbmm(x.key_tail @ d_after, x.scores.mT, d_out)
    d_before = torch.baddbmm(d_after * x.end, x.query_head.mT, d_out)
    d_v, d_beta = d_u, None
    d_system = None
    if inverse is not None:
        d_solved = inverse.mT @ d_u
        d_system = torch.bmm(d_solved, u.mT).neg_()
        rest = torch.baddbmm(x.v, x.key_head, state, alpha=-1)
        d_beta = (d_system * x.system).sum(-1) + (d_solved * rest).sum(-1)
        d_v, d_system = d_solved.mul_(x.beta), d_system.mul_(x.beta)
    d_q, d_k, d_cum = x.pairs_backward(d_out @ u.mT, d_system)

    d_query_head = (d_out @ state.mT).mul_(x.head)
    d_key = (u @ d_after.mT).mul_(x.tail)
    written = x.to_decay(d_key * x.k_H)
    d_cum += x.to_decay(d_query_head * x.q_H) - written
    d_cum[:, -1] += written.sum(1) + x.to_decay((d_after * state).sum(-1)) * x.end.squeeze(-1)
    if inverse is not None:
        d_key_head = (d_v @ state.mT).mul_(x.head)
        d_cum -= x.to_decay(d_key_head * x.k_H)
        d_key -= d_key_head
        d_before.baddbmm_(x.key_head.mT, d_v, alpha=-1)
    d_g = d_cum.flip(1).cumsum(1).flip(1)
    return d_q.add_(x.gather(d_query_head)), d_k.add_(x.gather(d_key)), d_v, d_g, d_beta, d_before


def _first_state(given: Tensor | None, k: Tensor, v: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``given`` [B,H,K,V], or zeros, in ``dtype``."""
    shape = (len(v), v.shape[2], k.shape[-1], v.shape[-1])
    return v.new_zeros(shape, dtype=dtype) if given is None else given.to(dtype).expand(shape)


def chunked_scan(
    q_BSMK: Tensor,
    k_BSMK: Tensor,
    v_BSHV: Tensor,
    g: Tensor,
    beta_BSH: Tensor | None,
    scale: float,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Run the recurrence above; ``g``: [B,S,H] or [B,S,H,K].

    Value heads h*H/M and following share query and key head h; with decays of channels M has to be H. Returns o
    [B,S,H,V] in v's dtype and the last state [B,H,K,V] in the compute dtype.
    """
    state = _first_state(initial_state, k_BSMK, v_BSHV, compute_dtype(q_BSMK, k_BSMK, v_BSHV, g))
    g_BSHK = g if g.dim() == 4 else g.unsqueeze(-1)
    with torch.autocast(v_BSHV.device.type, enabled=False):  # autocast would turn the scan's fp32 products into bf16
        out, last = _ChunkedScan.apply(
            q_BSMK, k_BSMK, v_BSHV, g_BSHK, beta_BSH, state.flatten(0, 1), scale, chunk_size
        )
    return out, last.view(state.shape)


def recurrent_scan(q, k, v, g, beta, scale, initial_state, chunk_size=1) -> tuple[Tensor, Tensor]:
    """Run ``chunked_scan`` one token at a time, for decoding and as the reference in tests."""
    dtype, groups = compute_dtype(q, k, v, g), v.shape[2] // q.shape[2]
    q_BSHK, k_BSHK = (x.to(dtype).repeat_interleave(groups, 2) for x in (q, k))
    q_BSHK, v_BSHV = q_BSHK * scale, v.to(dtype)
    decay_BSHK = (g if g.dim() == 4 else g.unsqueeze(-1)).to(dtype).exp()
    state_BHKV, outs = _first_state(initial_state, k, v, dtype), []
    for t in range(v.shape[1]):
        state_BHKV = state_BHKV * decay_BSHK[:, t].unsqueeze(-1)
        u_BHV = v_BSHV[:, t]
        if beta is not None:
            seen_BHV = torch.einsum("bhk,bhkv->bhv", k_BSHK[:, t], state_BHKV)
            u_BHV = (u_BHV - seen_BHV) * beta[:, t].to(dtype).unsqueeze(-1)
        state_BHKV = state_BHKV + k_BSHK[:, t].unsqueeze(-1) * u_BHV.unsqueeze(-2)
        outs.append(torch.einsum("bhk,bhkv->bhv", q_BSHK[:, t], state_BHKV))
    return torch.stack(outs, 1).to(v.dtype), state_BHKV
