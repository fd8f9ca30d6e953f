"""Chunked form of a gated linear recurrence, with or without the delta rule; forward and backward by hand.

Per head, with decay ``a_t = exp(g_t)``, the recurrence is

    S_t = a_t S_(t-1) + k_t u_t^T        o_t = scale q_t S_t
    u_t = beta_t (v_t - a_t k_t S_(t-1))          (delta rule: Gated DeltaNet)
    u_t = v_t                                     (no delta rule: Mamba-2's SSD)

Within a chunk this is a masked product; the delta rule adds one triangular system per chunk (the WY form of
"Gated Delta Networks", arXiv 2412.06464). One chunk is worked on at a time, so that its temporaries stay in the
cache; for backward only the states, ``u`` and the inverse of the triangular system are kept.

Shapes: B batch, S sequence, M key heads, H value heads (H/M share a key head), K key dim, V value dim;
inside a chunk: C positions, and batch x heads in one dimension, M or H.
"""

import torch


def compute_dtype(*tensors: torch.Tensor) -> torch.dtype:
    """Return fp32, or fp64 if an input is fp64: recurrences are never computed with less."""
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32


class _Decays:
    """Decays within a chunk: from j to i, from the start to i, from i to the end, and of the whole chunk.

    ``pair`` [H,C,C] (0 above the diagonal), ``head`` [H,C,1], ``tail`` [H,C,1] and ``end`` [H,1,1]. Values are masked
    before exp, so that every exponent is <= 0 and strong decay ends in 0, never in inf or nan. Log decays are summed
    in fp64, so that small differences keep all their digits after strong decay.
    """

    def __init__(self, g_HC: torch.Tensor):
        cum_HC1 = g_HC.double().cumsum(-1).unsqueeze(-1)
        size, dtype = g_HC.shape[-1], g_HC.dtype
        above_CC = torch.full((size, size), -torch.inf, dtype=dtype, device=g_HC.device).triu_(1)
        self.pair = (cum_HC1 - cum_HC1.mT).to(dtype).add_(above_CC).exp_()
        self.head = cum_HC1.to(dtype).exp()
        self.tail = (cum_HC1[:, -1:] - cum_HC1).to(dtype).exp_()
        self.end = self.head[:, -1:]


class _Chunk:
    """One chunk of the inputs, heads first and in the compute dtype, with the values that both passes need."""

    def __init__(self, span, q_BSMK, k_BSMK, v_BSHV, g_BSH, beta_BSH, scale, dtype):
        self.span, self.groups, self.batch = span, v_BSHV.shape[2] // q_BSMK.shape[2], len(v_BSHV)
        self.dtype = dtype
        self.q, self.k, self.v = self.take(q_BSMK) * scale, self.take(k_BSMK), self.take(v_BSHV)
        self.decays = _Decays(self.take(g_BSH))
        self.beta = None if beta_BSH is None else self.take(beta_BSH).unsqueeze(-1)
        self.q_H, self.k_H = self.spread(self.q), self.spread(self.k)
        self.scores = self.spread(self.q @ self.k.mT).mul_(self.decays.pair)
        self.query_head, self.key_tail = self.q_H * self.decays.head, self.k_H * self.decays.tail
        if beta_BSH is not None:
            self.key_head = self.k_H * self.decays.head
            self.system = self.spread(self.k @ self.k.mT).mul_(self.decays.pair).tril_(-1)

    def take(self, x_BSH: torch.Tensor) -> torch.Tensor:
        """Return a copy of this chunk: [B,S,H,..] -> [B*H,C,..]."""
        return x_BSH[:, self.span].transpose(1, 2).to(self.dtype).flatten(0, 1)

    def put(self, x_HC: torch.Tensor, into_BSH: torch.Tensor) -> None:
        into_BSH[:, self.span] = x_HC.unflatten(0, (self.batch, -1)).transpose(1, 2)

    def spread(self, x_MC: torch.Tensor) -> torch.Tensor:
        """Repeat a key head's tensor for each of its value heads."""
        return x_MC if self.groups == 1 else x_MC.repeat_interleave(self.groups, 0)

    def gather(self, x_HC: torch.Tensor) -> torch.Tensor:
        """Return the gradient of ``spread``: the sum over the value heads of a key head."""
        return x_HC if self.groups == 1 else x_HC.unflatten(0, (-1, self.groups)).sum(1)


def unit_lower_inverse(strict_HCC: torch.Tensor) -> torch.Tensor:
    """Return the inverse of ``I + strict`` for strictly lower triangular ``strict``."""
    eye_CC = torch.eye(strict_HCC.shape[-1], dtype=strict_HCC.dtype, device=strict_HCC.device)
    return torch.linalg.solve_triangular(strict_HCC, eye_CC.expand_as(strict_HCC), upper=False, unitriangular=True)


def spans(length: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


class _ChunkedScan(torch.autograd.Function):
    """(q, k [B,S,M,K], v [B,S,H,V], g, beta|None [B,S,H], state [B*H,K,V]) -> (o like v, last state)."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, scale, size):
        out, kept = torch.empty_like(v, memory_format=torch.contiguous_format), []
        for span in spans(v.shape[1], size):
            x = _Chunk(span, q, k, v, g, beta, scale, state.dtype)
            inverse, u = None, x.v
            if beta is not None:
                inverse = unit_lower_inverse(x.system * x.beta)
                u = inverse @ torch.baddbmm(x.v, x.key_head, state, alpha=-1).mul_(x.beta)
            kept += [state, u, inverse]
            x.put(torch.baddbmm(x.scores @ u, x.query_head, state), out)
            state = torch.baddbmm(state * x.decays.end, x.key_tail.mT, u)
        ctx.scale, ctx.size = scale, size
        ctx.save_for_backward(q, k, v, g, beta, *kept)
        ctx.set_materialize_grads(False)
        return out, state

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out, d_state):
        *inputs, beta = (saved := ctx.saved_tensors)[:5]  # read only once, as activation recompute requires
        kept = saved[5:]
        d_inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
        d_beta = None if beta is None else torch.empty_like(beta, memory_format=torch.contiguous_format)
        d_out = torch.zeros_like(inputs[2]) if d_out is None else d_out
        d_state = torch.zeros_like(kept[0]) if d_state is None else d_state
        chunks = spans(d_out.shape[1], ctx.size)
        for i in reversed(range(len(chunks))):
            x = _Chunk(chunks[i], *inputs, beta, ctx.scale, d_state.dtype)
            *d_chunk, d_chunk_beta, d_state = _chunk_backward(x, *kept[3 * i : 3 * i + 3], x.take(d_out), d_state)
            d_chunk[0] *= ctx.scale
            for d_part, d_whole in zip(d_chunk, d_inputs, strict=True):
                x.put(d_part, d_whole)
            if beta is not None:
                x.put(d_chunk_beta, d_beta)
        return *d_inputs, d_beta, d_state, None, None


def _chunk_backward(x: _Chunk, state, u, inverse, d_out, d_after):
    """Return gradients of (q, k, v, g, beta, state before the chunk), given those of the output and of the state after
    it.
    """
    decays = x.decays
    d_u = torch.baddbmm(x.key_tail @ d_after, x.scores.mT, d_out)
    d_before = torch.baddbmm(d_after * decays.end, x.query_head.mT, d_out)

    # Pairs within the chunk. The cumulated log decay enters pair (i, j) as cum_i - cum_j.
    d_scores = d_out @ u.mT
    d_cum = _row_minus_column(d_scores * x.scores)
    d_scores = x.gather(d_scores.mul_(decays.pair))
    d_q, d_k = d_scores @ x.k, d_scores.mT @ x.q
    d_v, d_beta = d_u, None

    # Gradients through reading the state before the chunk and writing the state after it.
    d_query_head = (d_out @ state.mT).mul_(decays.head)
    d_key = (u @ d_after.mT).mul_(decays.tail)
    written = (d_key * x.k_H).sum(-1)
    d_cum += (d_query_head * x.q_H).sum(-1) - written
    d_cum[:, -1] += written.sum(-1) + (d_after * state).sum((-1, -2)) * decays.end[:, 0, 0]

    if inverse is not None:
        d_solved = inverse.mT @ d_u
        rest = torch.baddbmm(x.v, x.key_head, state, alpha=-1)
        d_system = torch.bmm(d_solved, u.mT).neg_()
        per_pair = d_system * x.system
        d_beta = per_pair.sum(-1) + (d_solved * rest).sum(-1)
        d_cum += _row_minus_column(per_pair.mul_(x.beta))
        d_kk = x.gather(d_system.mul_(decays.pair).mul_(x.beta)).tril(-1)
        d_k = torch.baddbmm(d_k, d_kk + d_kk.mT, x.k)
        d_v = d_solved.mul_(x.beta)
        d_key_head = (d_v @ state.mT).mul_(decays.head)
        d_cum -= (d_key_head * x.k_H).sum(-1)
        d_key -= d_key_head
        d_before.baddbmm_(x.key_head.mT, d_v, alpha=-1)

    d_g = d_cum.flip(-1).cumsum(-1).flip(-1)
    return d_q.add_(x.gather(d_query_head)), d_k.add_(x.gather(d_key)), d_v, d_g, d_beta, d_before


def _row_minus_column(x_HCC: torch.Tensor) -> torch.Tensor:
    return x_HCC.sum(-1) - x_HCC.sum(-2)


def chunked_scan(
    q_BSMK: torch.Tensor,
    k_BSMK: torch.Tensor,
    v_BSHV: torch.Tensor,
    g_BSH: torch.Tensor,
    beta_BSH: torch.Tensor | None,
    scale: float,
    initial_state: torch.Tensor | None,
    chunk_size: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Run the recurrence above. Value heads h*H/M and following share query and key head h.

    Returns o [B,S,H,V] in v's dtype and the last state [B,H,K,V] in the compute dtype.
    """
    batch, _, heads, width = v_BSHV.shape
    dtype = compute_dtype(q_BSMK, k_BSMK, v_BSHV, g_BSH)
    shape = (batch, heads, k_BSMK.shape[-1], width)
    if initial_state is None:
        state = torch.zeros(shape, dtype=dtype, device=v_BSHV.device)
    else:
        state = initial_state.to(dtype).expand(shape)
    with torch.autocast(v_BSHV.device.type, enabled=False):  # autocast would turn the scan's fp32 products into bf16
        out, state = _ChunkedScan.apply(
            q_BSMK, k_BSMK, v_BSHV, g_BSH, beta_BSH, state.flatten(0, 1), scale, chunk_size
        )
    return out, state.view(shape)
