"""Chunked form of a gated linear recurrence, with or without the delta rule; forward and backward by hand.

Per head, with decay ``a_t = exp(g_t)``, the recurrence is

    S_t = a_t S_(t-1) + k_t u_t^T        o_t = q_t S_t
    u_t = beta_t (v_t - a_t k_t S_(t-1))          (delta rule: Gated DeltaNet)
    u_t = v_t                                     (no delta rule: Mamba-2's SSD)

Within a chunk this is a masked product; the delta rule adds one triangular system per chunk (the WY form of
"Gated Delta Networks", arXiv 2412.06464). Only the states are passed from chunk to chunk.

Shapes: N chunks, M batch x key heads, G value heads per key head, C positions in a chunk, K key dim, V value dim.
"""

import torch
import torch.nn.functional as F


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 where an input is fp64: recurrences are never run in less."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


def _unit_lower_inverse(strict_CC: torch.Tensor) -> torch.Tensor:
    """Inverse of ``I + strict`` for strictly lower triangular ``strict``."""
    eye = torch.eye(strict_CC.shape[-1], dtype=strict_CC.dtype, device=strict_CC.device)
    return torch.linalg.solve_triangular(strict_CC, eye.expand_as(strict_CC), upper=False, unitriangular=True)


def _decays(g_NMGC: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Decay from j to i within a chunk [.., C, C] (0 above the diagonal), from its start to i, from i to its end.

    Masked before exp, so that every exponent is <= 0 and strong decay ends in 0, never in inf or nan; cumulated in
    fp64, so that after strong decay the small differences still have all their digits.
    """
    cum_NMGC = g_NMGC.double().cumsum(-1)
    size, dtype = cum_NMGC.shape[-1], g_NMGC.dtype
    above = torch.ones(size, size, dtype=torch.bool, device=g_NMGC.device).triu_(1)
    pair_NMGCC = (cum_NMGC.unsqueeze(-1) - cum_NMGC.unsqueeze(-2)).to(dtype).masked_fill_(above, -torch.inf).exp_()
    return pair_NMGCC, cum_NMGC.to(dtype).exp(), (cum_NMGC[..., -1:] - cum_NMGC).to(dtype).exp_()


class _ChunkedScan(torch.autograd.Function):
    """(q, k [N,M,1,C,K], v [N,M,G,C,V], g and beta|None [N,M,G,C], state [M,G,K,V]) -> (o like v, last state)."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state):
        pair, head, tail = _decays(g)
        end = head[..., -1:, None]
        scores = (q @ k.mT) * pair
        key_head, key_tail = k * head.unsqueeze(-1), k * tail.unsqueeze(-1)
        kk = inverse = None
        if beta is None:
            u, rest = v, None
        else:
            kk = ((k @ k.mT) * pair).tril_(-1)
            inverse = _unit_lower_inverse(kk * beta.unsqueeze(-1))
            u, rest = torch.empty_like(v), torch.empty_like(v)
        states = torch.empty(len(q), *state.shape, dtype=v.dtype, device=v.device)
        for c in range(len(q)):
            states[c] = state
            if beta is not None:
                torch.sub(v[c], key_head[c] @ state, out=rest[c])
                torch.matmul(inverse[c], rest[c] * beta[c].unsqueeze(-1), out=u[c])
            state = torch.addcmul(key_tail[c].mT @ u[c], state, end[c])
        out = (q * head.unsqueeze(-1)) @ states
        out += scores @ u
        ctx.save_for_backward(q, k, beta, pair, head, tail, scores, kk, inverse, rest, u, states)
        ctx.set_materialize_grads(False)
        return out, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_state):
        q, k, beta, pair, head, tail, scores, kk, inverse, rest, u, states = ctx.saved_tensors
        d_out = torch.zeros_like(u) if d_out is None else d_out
        head, tail = head.unsqueeze(-1), tail.unsqueeze(-1)
        d_u = scores.mT @ d_out
        d_solved = None if beta is None else torch.empty_like(u)  # gradient of beta * rest
        d_states = _backward_states(q * head, k * head, k * tail, head, d_out, d_state, d_u, d_solved, beta, inverse)

        # Inside the chunk: scores, and the triangular system of the delta rule.
        d_qk = (d_out @ u.mT).mul_(pair)
        d_cum = _row_minus_column(d_qk * (q @ k.mT))
        d_q = _sum_heads(d_qk) @ k
        d_k = _sum_heads(d_qk).mT @ q
        d_v, d_beta = d_u, None
        if beta is not None:
            d_system = (d_solved @ u.mT).neg_()
            per_pair = d_system * kk
            d_beta = per_pair.sum(-1) + (d_solved * rest).sum(-1)
            d_cum += _row_minus_column(per_pair.mul_(beta.unsqueeze(-1)))
            d_kk = _sum_heads(d_system.mul_(pair).mul_(beta.unsqueeze(-1))).tril(-1)
            d_k += (d_kk + d_kk.mT) @ k
            d_v = d_solved * beta.unsqueeze(-1)
            d_key_head = (d_v @ states.mT).mul_(head).neg_()
            d_k += _sum_heads(d_key_head)
            d_cum += (d_key_head * k).sum(-1)

        # Between chunks: reading the state at the start, writing the state at the end.
        d_query_head = (d_out @ states.mT).mul_(head)
        d_q += _sum_heads(d_query_head)
        d_cum += (d_query_head * q).sum(-1)
        d_key_tail = (u @ d_states[1:].mT).mul_(tail)
        d_k += _sum_heads(d_key_tail)
        written = (d_key_tail * k).sum(-1)
        d_cum -= written
        d_cum[..., -1] += written.sum(-1) + (d_states[1:] * states).sum((-1, -2)) * head[..., -1, 0]
        d_g = d_cum.flip(-1).cumsum(-1).flip(-1)
        return d_q, d_k, d_v, d_g, d_beta, d_states[0]


def _backward_states(q_head, key_head, key_tail, head, d_out, d_state, d_u, d_solved, beta, inverse):
    """Gradients of the state before each chunk, and after the last; completes ``d_u``, fills ``d_solved``."""
    from_out = q_head.mT @ d_out
    d_states = from_out.new_zeros(len(from_out) + 1, *from_out.shape[1:])
    if d_state is not None:
        d_states[-1] = d_state
    for c in reversed(range(len(from_out))):
        d_u[c] += key_tail[c] @ d_states[c + 1]
        d_before = torch.addcmul(from_out[c], d_states[c + 1], head[c, ..., -1:, :])
        if beta is not None:
            torch.matmul(inverse[c].mT, d_u[c], out=d_solved[c])
            d_before -= key_head[c].mT @ (d_solved[c] * beta[c].unsqueeze(-1))
        d_states[c] = d_before
    return d_states


def _sum_heads(x_NMG: torch.Tensor) -> torch.Tensor:
    """Gradient of a tensor that the G value heads of a key head share."""
    return x_NMG if x_NMG.shape[2] == 1 else x_NMG.sum(2, keepdim=True)


def _row_minus_column(x_CC: torch.Tensor) -> torch.Tensor:
    """Gradient of the cumulated log decay, which enters each pair (i, j) as cum_i - cum_j."""
    return x_CC.sum(-1) - x_CC.sum(-2)


def _to_chunks(x_BSH: torch.Tensor, size: int, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """[B,S,M*G,..] -> contiguous [N,B*M,G,C,..], padded with zeros (which neither decay nor write)."""
    batch, length, heads = x_BSH.shape[:3]
    if pad := -length % size:
        x_BSH = F.pad(x_BSH, (0, 0) * (x_BSH.dim() - 2) + (0, pad))
    x = x_BSH.to(dtype).reshape(batch, (length + pad) // size, size, heads, -1).permute(1, 0, 3, 2, 4)
    x = x.reshape(x.shape[0], batch * heads // groups, groups, size, -1)
    return x.squeeze(-1) if x_BSH.dim() == 3 else x


def chunked_scan(
    q_BSMK: torch.Tensor,
    k_BSMK: torch.Tensor,
    v_BSHV: torch.Tensor,
    g_BSH: torch.Tensor,
    beta_BSH: torch.Tensor | None,
    initial_state: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The recurrence above; value heads h*G .. h*G+G-1 share query and key head h. Returns o [B,S,H,V] and
    the last state [B,H,K,V], both in the compute dtype."""
    batch, length, heads, width = v_BSHV.shape
    groups = heads // q_BSMK.shape[2]
    dtype = compute_dtype(q_BSMK, k_BSMK, v_BSHV, g_BSH)
    size = min(chunk_size, length)
    q, k = (_to_chunks(x, size, 1, dtype) for x in (q_BSMK, k_BSMK))
    v, g = (_to_chunks(x, size, groups, dtype) for x in (v_BSHV, g_BSH))
    beta = None if beta_BSH is None else _to_chunks(beta_BSH, size, groups, dtype)
    state_shape = (q.shape[1], groups, q.shape[-1], width)
    state = v.new_zeros(state_shape) if initial_state is None else initial_state.to(dtype).reshape(state_shape)
    out, state = _ChunkedScan.apply(q, k, v, g, beta, state)
    out = out.reshape(len(q), batch, heads, size, width).permute(1, 0, 3, 2, 4).reshape(batch, -1, heads, width)
    return out[:, :length], state.reshape(batch, heads, *state_shape[2:])
