"""Causal attention of a context-parallel rank's queries to keys and values of all ranks.

What the ranks exchange (``exchange.py``) is what heads share: MLA's latents, R + P values a token, of which each rank
makes keys and values; or the keys and values themselves, where several query heads share them
(``mixers/megatron_attention.py``). One function does both, exact forward and backward.

Zig-zag balance: rank r of n holds chunks r and 2n-1-r of 2n. Which keys of rank s its queries see depends on s. If s =
r, they see all earlier keys (causal). If s < r, all queries see the first half of the keys. If s > r, the second half
of the queries sees all keys. So every block is a plain attention without a mask, of equal work for every rank, and no
score is computed that is masked. Blocks of all ranks before this one, and of all after, are one block each.

Legend: S queries of this rank, L tokens of a rank, B batch, H query heads, G key heads, K key, V value width, R + P
latent and rope: the width of what is exchanged; m ranks.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from hylo_megatron.kernels import attention, ops_for
from hylo_megatron.kernels.chunked import compute_dtype
from hylo_megatron.parallel.exchange import Gather, Ring, exchange

# (latents of some tokens of a rank [L,B,R+P], the rank, which tokens) -> k, v [B,G,L,..]
Expand = Callable[[Tensor, int, slice], tuple[Tensor, Tensor]]


def spans(rank: int, source: int, length: int) -> tuple[slice, slice, bool]:
    """Return which of ``rank``'s queries see which of ``source``'s keys, and whether causally."""
    half, everything = length // 2, slice(0, length)
    if source == rank:
        return everything, everything, True
    return (everything, slice(0, half), False) if source < rank else (slice(half, length), everything, False)


@dataclass(frozen=True, kw_only=True)
class Shared:
    """How ranks share keys and values. ``expand`` makes them of latents with ``parameters``.

    ``values``: how many values it makes of a token. ``mode``: --cp-comm-type.
    """

    group: object
    scale: float
    expand: Expand
    values: int
    parameters: tuple[Tensor, ...] = ()
    mode: str | None = None

    def exchange(self, latents_LBR: Tensor) -> Gather | Ring:
        tokens = latents_LBR[..., 0].numel() * latents_LBR.element_size()
        return exchange(self.group, self.mode, tokens * latents_LBR.shape[-1], tokens * self.values)

    def keys_and_values(self, ranks: range, held_mLBR: Tensor, keys: slice) -> tuple[Tensor, Tensor]:
        made = [self.expand(held[keys], source, keys) for source, held in zip(ranks, held_mLBR, strict=True)]
        return made[0] if len(made) == 1 else tuple(torch.cat(parts, 2) for parts in zip(*made, strict=True))

    def sum_dtype(self, like: Tensor) -> torch.dtype:
        """Return the dtype in which blocks are added up: two blocks are added and rounded at once."""
        return like.dtype if self.group.size() == 2 else compute_dtype(like)


class _Attention(torch.autograd.Function):
    """(q [B,H,S,K], latents [L,B,R+P]) -> [B,H,S,V]."""

    @staticmethod
    def forward(ctx, q, latents, shared: Shared, *parameters):
        rank, length = shared.group.rank(), q.shape[2]
        ways = shared.exchange(latents)
        out = lse = None
        for ranks, held in ways.arrivals(latents):
            queries, keys, causal = spans(rank, ranks[0], length)
            k, v = shared.keys_and_values(ranks, held, keys)
            part, part_lse = attention.attend(q[:, :, queries], k, v, causal, shared.scale)
            if out is None:  # the rank's own block, which has all queries
                out, lse = part.to(shared.sum_dtype(q)), part_lse
            else:
                ops_for(q).join_attention(out[:, :, queries], lse[:, :, queries], part, part_lse)
        out = out.to(q.dtype)
        ctx.save_for_backward(q, ways.kept, out, lse, *parameters)
        ctx.shared, ctx.ways = shared, ways
        ways.kept = None
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, kept, out, lse, *parameters = ctx.saved_tensors
        shared, ways = ctx.shared, ctx.ways
        rank, length = shared.group.rank(), q.shape[2]
        d_q, d_parameters = None, [torch.zeros_like(p, dtype=compute_dtype(q)) for p in parameters]
        for ranks, held in ways.arrivals_again(kept):
            queries, keys, causal = spans(rank, ranks[0], length)
            with torch.enable_grad():
                held = held.detach().requires_grad_()
                k, v = shared.keys_and_values(ranks, held, keys)
            d_part, d_k, d_v = attention.attend_backward(
                *(x[:, :, queries] for x in (d_out, q)), k.detach(), v.detach(),
                *(x[:, :, queries] for x in (out, lse)), causal, shared.scale,
            )  # fmt: skip
            if d_q is None:
                d_q = d_part.to(shared.sum_dtype(q))
            else:
                d_q[:, :, queries] += d_part
            d_held, *d_used = torch.autograd.grad((k, v), (held, *parameters), (d_k.to(k.dtype), d_v.to(v.dtype)))
            for total, part in zip(d_parameters, d_used, strict=True):
                total += part
            ways.gradient(ranks, d_held)
        d_parameters = [d.to(p.dtype) for d, p in zip(d_parameters, parameters, strict=True)]
        return d_q.to(q.dtype), ways.total().to(kept.dtype), None, *d_parameters


def attention_across_ranks(q_BHSK: Tensor, latents_LBR: Tensor, shared: Shared) -> Tensor:
    """Return the attention's output ``[B,H,S,V]``; the gradient of ``shared.parameters`` is this rank's part."""
    return _Attention.apply(q_BHSK, latents_LBR, shared, *shared.parameters)
