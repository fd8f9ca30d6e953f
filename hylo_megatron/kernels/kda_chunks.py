"""Chunked form of Kimi Delta Attention's recurrence (``kda.py``); forward and backward by hand.

Within a chunk, position i reads position j with the weight

    sum over channels of q_i k_j exp(g_(j+1) + .. + g_i)

No matrix product gives this in one piece without exponents above 0, because every channel decays at its own rate.
But the sum of log decays may be cut at any position between j and i, which leaves two factors of at most 1. So the
second half of a chunk reads the first half by one product, cut at the middle; then the second quarter reads the first
and the fourth the third, and so on down to neighbours: log2(C) batched products. All sums of log decays run within one
block and have one sign, so that nothing cancels and strong decay ends in 0, never in inf or nan.

The rest is as in ``chunked.py``: one chunk at a time, one triangular system a chunk, and backward keeps the states,
``u`` and the inverse of the system. Shapes: B batch, S sequence, H heads, K key dim, V value dim; inside a chunk
C positions (a power of two, zeros at the end), and batch x heads in the one dimension H.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.kernels.chunked import compute_dtype, spans, unit_lower_inverse


class _Decays:
    """Decays of one chunk, all between 0 and 1.

    ``levels``: for each block size N = 1, 2, .. C/2 the decay from the start of a second block through its position i,
    and from after position j to the end of a first block, both [H,C/2N,N,K]. ``head`` and ``tail`` [H,C,K] are the
    same for the whole chunk, and ``end`` [H,K,1] is the decay through all of it.
    """

    def __init__(self, g_HCK: Tensor):
        head, tail = g_HCK.clone(), torch.zeros_like(g_HCK)
        self.levels, size = [], 1
        while size < g_HCK.shape[1]:
            first, second = _halves(head, size)
            tail_first, _ = _halves(tail, size)
            self.levels.append((second.exp(), tail_first.exp()))
            tail_first += second[:, :, -1:]
            second += first[:, :, -1:]
            size *= 2
        self.head, self.tail = head.exp_(), tail.exp_()
        self.end = self.head[:, -1].unsqueeze(-1)


def _halves(x_HCK: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Views [H,C/2N,N,K] of the first and of the second blocks of ``size`` N."""
    return x_HCK.unflatten(1, (-1, 2, size)).unbind(2)


def _below(x_HCC: Tensor, size: int) -> Tensor:
    """A view [H,C/2N,N,N]: where the second blocks of ``size`` N (rows) meet the first (columns)."""
    blocks = x_HCC.unflatten(2, (-1, 2, size)).unflatten(1, (-1, 2, size))[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


class _Chunk:
    """One chunk of the inputs, heads first and in the compute dtype, with what forward and backward both need."""

    def __init__(self, span: slice, q_BSHK, k_BSHK, v_BSHV, g_BSHK, beta_BSH, scale: float, dtype: torch.dtype):
        self.span, self.batch, self.length, self.dtype = span, len(v_BSHV), span.stop - span.start, dtype
        self.padding = (1 << (self.length - 1).bit_length()) - self.length
        self.q, self.k, self.v = self.take(q_BSHK) * scale, self.take(k_BSHK), self.take(v_BSHV)
        self.beta = self.take(beta_BSH.unsqueeze(-1))
        self.decays = _Decays(self.take(g_BSHK))
        self.query_head, self.key_head = self.q * self.decays.head, self.k * self.decays.head
        self.key_tail = self.k * self.decays.tail
        shape = (*self.q.shape[:2], self.q.shape[1])
        self.scores, self.system = self.q.new_zeros(shape), self.q.new_zeros(shape)
        self.scores.diagonal(dim1=1, dim2=2).copy_((self.q * self.k).sum(-1))
        for size, queries, rows, columns, _, _ in self.pairs():
            _below(self.scores, size).copy_(queries @ columns.mT)
            _below(self.system, size).copy_(rows @ columns.mT)

    def take(self, x_BSH: Tensor) -> Tensor:
        """[B,S,H,..] -> [B*H,C,..] of this chunk, a copy with zeros at its end."""
        taken = x_BSH[:, self.span].transpose(1, 2).to(self.dtype).flatten(0, 1)
        return F.pad(taken, (0, 0, 0, self.padding))

    def put(self, x_HC: Tensor, into_BSH: Tensor) -> None:
        into_BSH[:, self.span] = x_HC[:, : self.length].unflatten(0, (self.batch, -1)).transpose(1, 2)

    def pairs(self):
        """Yield for each block size the decayed queries and keys of the second blocks, the decayed keys of the first
        blocks, and both decays."""
        for level, (head, tail) in enumerate(self.decays.levels):
            size = 1 << level
            k_first, k_second = _halves(self.k, size)
            yield size, _halves(self.q, size)[1] * head, k_second * head, k_first * tail, head, tail

    def pairs_backward(self, d_scores: Tensor, d_system: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of the queries, of the keys and of the cumulated log decay, through ``scores`` and ``system``."""
        d_q, d_rows, d_columns = (torch.zeros_like(self.k) for _ in range(3))
        for size, queries, rows, columns, head, tail in self.pairs():
            d_queries_below, d_rows_below = _below(d_scores, size), _below(d_system, size)
            _halves(d_q, size)[1].add_((d_queries_below @ columns).mul_(head))
            _halves(d_rows, size)[1].add_((d_rows_below @ columns).mul_(head))
            d_first = d_queries_below.mT @ queries + d_rows_below.mT @ rows
            _halves(d_columns, size)[0].add_(d_first.mul_(tail))
        d_cum = d_q * self.q + (d_rows - d_columns) * self.k
        here = d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)  # no decay between a position and itself
        return d_q.addcmul_(here, self.k), d_rows.add_(d_columns).addcmul_(here, self.q), d_cum


class _ChunkedKDA(torch.autograd.Function):
    """(q, k, g [B,S,H,K], v [B,S,H,V], beta [B,S,H], state [B*H,K,V]) -> (o like v, last state)."""

    @staticmethod
    def forward(ctx, q, k, v, g, beta, state, scale, size):
        out, kept = torch.empty_like(v, memory_format=torch.contiguous_format), []
        for span in spans(v.shape[1], size):
            x = _Chunk(span, q, k, v, g, beta, scale, state.dtype)
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
        saved = ctx.saved_tensors  # read once: under activation recompute it cannot be again
        inputs, kept = saved[:5], saved[5:]
        d_inputs = [torch.empty_like(t, memory_format=torch.contiguous_format) for t in inputs]
        d_out = torch.zeros_like(inputs[2]) if d_out is None else d_out
        d_state = torch.zeros_like(kept[0]) if d_state is None else d_state
        chunks = spans(d_out.shape[1], ctx.size)
        for i in reversed(range(len(chunks))):
            x = _Chunk(chunks[i], *inputs, ctx.scale, d_state.dtype)
            *d_chunk, d_state = _chunk_backward(x, *kept[3 * i : 3 * i + 3], x.take(d_out), d_state)
            d_chunk[0] *= ctx.scale
            for d_part, d_whole in zip(d_chunk, d_inputs, strict=True):
                x.put(d_part, d_whole)
        return *d_inputs, d_state, None, None


def _chunk_backward(x: _Chunk, state, u, inverse, d_out, d_after):
    """Gradients of (q, k, v, g, beta, state before the chunk), from those of its output and of the state after it."""
    decays = x.decays
    d_u = torch.baddbmm(x.key_tail @ d_after, x.scores.mT, d_out)
    d_solved = inverse.mT @ d_u
    d_system = torch.bmm(d_solved, u.mT).neg_()
    rest = torch.baddbmm(x.v, x.key_head, state, alpha=-1)
    d_beta = (d_system * x.system).sum(-1) + (d_solved * rest).sum(-1)
    d_v = d_solved * x.beta

    # The cumulated log decay enters pair (i, j) as cum_i - cum_j, the state before the chunk as cum_i, and the state
    # after it as cum_C - cum_i.
    d_q, d_k, d_cum = x.pairs_backward(d_out @ u.mT, d_system.mul_(x.beta))
    d_query_head = (d_out @ state.mT).mul_(decays.head)
    d_key_head = (d_v @ state.mT).mul_(decays.head).neg_()
    d_key_tail = (u @ d_after.mT).mul_(decays.tail)
    written = d_key_tail * x.k
    d_cum += d_query_head * x.q + d_key_head * x.k - written
    d_cum[:, -1] += written.sum(1) + (d_after * state).sum(-1) * decays.end.squeeze(-1)
    d_g = d_cum.flip(1).cumsum(1).flip(1)

    d_before = torch.baddbmm(d_after * decays.end, x.query_head.mT, d_out)
    d_before.baddbmm_(x.key_head.mT, d_v, alpha=-1)
    return d_q + d_query_head, d_k + d_key_head + d_key_tail, d_v, d_g, d_beta, d_before


def chunked_kda(
    q_BSHK: Tensor,
    k_BSHK: Tensor,
    v_BSHV: Tensor,
    g_BSHK: Tensor,
    beta_BSH: Tensor,
    *,
    scale: float,
    initial_state: Tensor | None,
    chunk_size: int,
) -> tuple[Tensor, Tensor]:
    """Return o [B,S,H,V] in v's dtype and the last state [B,H,K,V] in the compute dtype."""
    dtype = compute_dtype(q_BSHK, k_BSHK, v_BSHV, g_BSHK)
    shape = (len(v_BSHV), v_BSHV.shape[2], k_BSHK.shape[-1], v_BSHV.shape[-1])
    if initial_state is None:
        state = torch.zeros(shape, dtype=dtype, device=v_BSHV.device)
    else:
        state = initial_state.to(dtype).expand(shape)
    with torch.autocast(v_BSHV.device.type, enabled=False):  # it would turn the scan's fp32 products into bf16
        out, state = _ChunkedKDA.apply(
            q_BSHK, k_BSHK, v_BSHV, g_BSHK, beta_BSH, state.flatten(0, 1), scale, chunk_size
        )
    return out, state.view(shape)
