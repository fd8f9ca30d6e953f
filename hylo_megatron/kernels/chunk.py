"""One chunk of a gated linear recurrence: decays, and what queries read of the chunk's own keys.

``chunked.py`` has the recurrence and the legend.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


class Chunk:
    """One chunk of the inputs, heads first and in the compute dtype, with the values that both passes need.

    ``head``, ``tail`` and ``end`` are decays from the chunk's start to a position, from a position to the chunk's end,
    and of the complete chunk. ``scores`` and ``system`` [H,C,C] are what queries and keys read of earlier keys,
    decayed; only ``scores`` has a diagonal.
    """

    padding = 0  # zeros behind the positions

    def __init__(self, span: slice, q_BSMK, k_BSMK, v_BSHV, g_BSHK, beta_BSH, scale: float, dtype: torch.dtype):
        self.span, self.length = span, span.stop - span.start
        self.batch, self.dtype = len(v_BSHV), dtype
        self.groups = v_BSHV.shape[2] // q_BSMK.shape[2]
        self.q, self.k = self.take(q_BSMK) * scale, self.take(k_BSMK)
        self.v = self.take(v_BSHV)
        self.beta = None if beta_BSH is None else self.take(beta_BSH.unsqueeze(-1))
        self.q_H, self.k_H = self.spread(self.q), self.spread(self.k)
        self.read_pairs(self.take(g_BSHK))
        self.query_head, self.key_tail = self.q_H * self.head, self.k_H * self.tail
        if beta_BSH is not None:
            self.key_head = self.k_H * self.head

    def take(self, x_BSH: Tensor) -> Tensor:
        """Return a copy of this chunk: [B,S,H,..] -> [B*H,C,..]."""
        taken = x_BSH[:, self.span].transpose(1, 2).to(self.dtype).flatten(0, 1)
        return F.pad(taken, (0, 0, 0, self.padding)) if self.padding else taken

    def put(self, x_HC: Tensor, into_BSH: Tensor) -> None:
        into_BSH[:, self.span] = x_HC[:, : self.length].unflatten(0, (self.batch, -1)).transpose(1, 2)

    def spread(self, x_MC: Tensor) -> Tensor:
        """Repeat a key head's tensor for each of its value heads."""
        return x_MC if self.groups == 1 else x_MC.repeat_interleave(self.groups, 0)

    def gather(self, x_HC: Tensor) -> Tensor:
        """Return the gradient of ``spread``: the sum over the value heads of a key head."""
        return x_HC if self.groups == 1 else x_HC.unflatten(0, (-1, self.groups)).sum(1)


class HeadChunk(Chunk):
    """A chunk with one decay for all channels of a head; ``pair`` [H,C,C] is the decay from position j to i.

    Values are masked before exp, so that every exponent is <= 0 and strong decay ends in 0, never in inf or nan. Log
    decays are summed in fp64, so that small differences keep all their digits after strong decay.
    """

    def read_pairs(self, g_HC1: Tensor) -> None:
        cum_HC1 = g_HC1.double().cumsum(1)
        size, dtype = g_HC1.shape[1], g_HC1.dtype
        above_CC = torch.full((size, size), -torch.inf, dtype=dtype, device=g_HC1.device).triu_(1)
        self.pair = (cum_HC1 - cum_HC1.mT).to(dtype).add_(above_CC).exp_()
        self.head = cum_HC1.to(dtype).exp()
        self.tail = (cum_HC1[:, -1:] - cum_HC1).to(dtype).exp_()
        self.end = self.head[:, -1:]
        self.scores = self.spread(self.q @ self.k.mT).mul_(self.pair)
        if self.beta is not None:
            self.system = self.spread(self.k @ self.k.mT).mul_(self.pair).tril_(-1)

    def to_decay(self, x_HCK: Tensor) -> Tensor:
        """Return the gradient of a decay from that of each channel."""
        return x_HCK.sum(-1, keepdim=True)

    def pairs_backward(self, d_scores: Tensor, d_system: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients of queries, keys and cumulated log decay through ``scores`` and ``system``.

        The cumulated log decay enters pair (i, j) as cum_i - cum_j.
        """
        d_cum = _row_minus_column(d_scores * self.scores)
        d_scores = self.gather(d_scores.mul_(self.pair))
        d_q, d_k = d_scores @ self.k, d_scores.mT @ self.q
        if d_system is not None:
            d_cum += _row_minus_column(d_system * self.system)
            d_kk = self.gather(d_system.mul_(self.pair)).tril(-1)
            d_k = torch.baddbmm(d_k, d_kk + d_kk.mT, self.k)
        return d_q, d_k, d_cum.unsqueeze(-1)


def _row_minus_column(x_HCC: Tensor) -> Tensor:
    return x_HCC.sum(-1) - x_HCC.sum(-2)


class ChannelChunk(Chunk):
    """A chunk in which each key channel decays at its own rate. Position i reads position j with the weight

        sum over channels of q_i k_j exp(g_(j+1) + .. + g_i)

    No single matrix product gives this without exponents above 0. The sum of log decays can be cut at any position
    between j and i, which leaves two factors of at most 1. So the second half of a chunk reads the first half by one
    product, cut at the middle. Then the second quarter reads the first and the fourth the third, and so on down to
    neighbours: log2(C) batched products. Each sum of log decays stays within one block and has one sign, so that
    nothing cancels and strong decay ends in 0, never in inf or nan.

    C is a power of two, with zeros at the end. ``levels`` has for each block size N = 1, 2, .. C/2 the decay from the
    start of a second block through its position i, and from after position j to the end of a first block, both
    [H,C/2N,N,K].
    """

    @property
    def padding(self) -> int:
        return (1 << (self.length - 1).bit_length()) - self.length

    def read_pairs(self, g_HCK: Tensor) -> None:
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
        shape = (*self.q.shape[:2], self.q.shape[1])
        self.scores, self.system = self.q.new_zeros(shape), self.q.new_zeros(shape)
        self.scores.diagonal(dim1=1, dim2=2).copy_((self.q * self.k).sum(-1))
        for size, queries, rows, columns, _, _ in self.blocks():
            _below(self.scores, size).copy_(queries @ columns.mT)
            _below(self.system, size).copy_(rows @ columns.mT)

    def blocks(self):
        """Yield for each block size the decayed queries and keys of the second blocks, the decayed keys of the first
        blocks, and both decays."""
        for level, (head, tail) in enumerate(self.levels):
            size = 1 << level
            k_first, k_second = _halves(self.k, size)
            yield size, _halves(self.q, size)[1] * head, k_second * head, k_first * tail, head, tail

    def to_decay(self, x_HCK: Tensor) -> Tensor:
        """Return the gradient of a decay from that of each channel."""
        return x_HCK

    def pairs_backward(self, d_scores: Tensor, d_system: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return gradients of queries, keys and cumulated log decay through ``scores`` and ``system``."""
        d_q, d_rows, d_columns = (torch.zeros_like(self.k) for _ in range(3))
        for size, queries, rows, columns, head, tail in self.blocks():
            d_queries_below, d_rows_below = _below(d_scores, size), _below(d_system, size)
            _halves(d_q, size)[1].add_((d_queries_below @ columns).mul_(head))
            _halves(d_rows, size)[1].add_((d_rows_below @ columns).mul_(head))
            d_first = d_queries_below.mT @ queries + d_rows_below.mT @ rows
            _halves(d_columns, size)[0].add_(d_first.mul_(tail))
        d_cum = d_q * self.q + (d_rows - d_columns) * self.k
        here = d_scores.diagonal(dim1=1, dim2=2).unsqueeze(-1)  # no decay between a position and itself
        return d_q.addcmul_(here, self.k), d_rows.add_(d_columns).addcmul_(here, self.q), d_cum


def _halves(x_HCK: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Return views [H,C/2N,N,K] of the first and of the second blocks of ``size`` N."""
    return x_HCK.unflatten(1, (-1, 2, size)).unbind(2)


def _below(x_HCC: Tensor, size: int) -> Tensor:
    """Return a view [H,C/2N,N,N]: where the second blocks of ``size`` N (rows) meet the first (columns)."""
    blocks = x_HCC.unflatten(2, (-1, 2, size)).unflatten(1, (-1, 2, size))[:, :, 1, :, :, 0]
    return blocks.diagonal(dim1=1, dim2=3).movedim(-1, 1)


def chunk_of(span: slice, q_BSMK, k_BSMK, v_BSHV, g_BSHK, *rest) -> Chunk:
    """Return the chunk at ``span``, of the kind that the decays' number of channels needs."""
    kind = HeadChunk if g_BSHK.shape[-1] == 1 else ChannelChunk
    return kind(span, q_BSMK, k_BSMK, v_BSHV, g_BSHK, *rest)
