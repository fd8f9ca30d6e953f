"""Causal attention of a context-parallel rank's queries over latents that all ranks share.

MLA's latents (R + P values per token, shared by all heads) are exchanged, not the keys and values made from them: by
all-gather, or around a ring that never holds more than two ranks' latents. One function does both, exact forward and
backward. Keys and values that several heads share are exchanged in the same way (``mixers/megatron_attention.py``).

Zig-zag balance: rank r of n holds chunks r and 2n-1-r of 2n. Which keys of rank s its queries see depends on s. If s =
r, they see all earlier keys (causal). If s < r, all queries see the first half of the keys. If s > r, the second half
of the queries sees all keys. So every block is a plain attention of equal work, and no mask exists.

Legend: S queries of this rank, L latents of a rank, B batch, H heads, K key, V value width, R + P latent and rope.
"""

from collections.abc import Callable, Iterator

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from hylo_megatron.kernels.chunked import compute_dtype

Expand = Callable[[Tensor, int], tuple[Tensor, Tensor]]  # (latents of a rank [L,B,R+P], the rank) -> k, v [B,H,L,..]


def spans(rank: int, source: int, length: int) -> tuple[slice, slice, bool]:
    """Return which of ``rank``'s queries see which of ``source``'s keys, and whether causally."""
    half, everything = length // 2, slice(0, length)
    if source == rank:
        return everything, everything, True
    return (everything, slice(0, half), False) if source < rank else (slice(half, length), everything, False)


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = q @ k.mT * scale
    return scores + torch.full_like(scores[0, 0], -torch.inf).triu_(1) if causal else scores


def attend_plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Compute ``attend`` with all scores in memory: the reference, and the version for fp32 on a GPU."""
    scores = _scores(q, k, causal, scale)
    return scores.softmax(-1) @ v, scores.logsumexp(-1)


def attend_plain_backward(d_out, q, k, v, out, lse, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    p = (_scores(q, k, causal, scale) - lse[..., None]).exp()
    d_scores = p * (d_out @ v.mT - (d_out * out).sum(-1, keepdim=True)) * scale
    return d_scores @ k, d_scores.mT @ q, p.mT @ d_out


def _one_width(*parts: Tensor) -> list[Tensor]:
    """Return ``parts`` padded with zeros to one width, a multiple of 8, which flash attention on a GPU needs."""
    width = max(part.shape[-1] for part in parts)
    width += -width % 8
    return [F.pad(part, (0, width - part.shape[-1])) for part in parts]


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Run flash attention and return also the logarithm of its denominators: ``out [B,H,S,V], lse [B,H,S]``."""
    if q.is_cuda and q.dtype == torch.float32:
        return attend_plain(q, k, v, causal, scale)
    q, k, v = _one_width(q, k, v)
    if q.is_cuda:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    else:
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    return out, lse


def attend_backward(d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool,
                    scale: float) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """Return gradients of a block, given the output and the denominators of all blocks together."""
    if q.is_cuda and q.dtype == torch.float32:
        return attend_plain_backward(d_out, q, k, v, out, lse, causal, scale)
    key_width, value_width = k.shape[-1], v.shape[-1]
    q, k, v, d_out, out = _one_width(q, k, v, d_out, out)
    if q.is_cuda:
        nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)  # without dropout there is no random state
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse, None, None, q.shape[2], k.shape[2], 0.0, causal, nothing, nothing[0], scale=scale
        )
    else:
        d_q, d_k, d_v = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, causal, scale=scale
        )
    return d_q[..., :key_width], d_k[..., :key_width], d_v[..., :value_width]


class _Ring:
    """Passes tensors to the next rank while the current ones are used."""

    def __init__(self, group):
        ranks = dist.get_process_group_ranks(group)
        self.group, self.rank, self.size = group, group.rank(), group.size()
        self.next, self.previous = (ranks[(self.rank + step) % self.size] for step in (1, -1))

    def start(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Send ``tensor`` to the next rank. The result, when called, waits for the previous rank's tensor."""
        tensor, received = tensor.contiguous(), torch.empty_like(tensor, memory_format=torch.contiguous_format)
        works = dist.batch_isend_irecv([
            dist.P2POp(dist.isend, tensor, self.next, self.group),
            dist.P2POp(dist.irecv, received, self.previous, self.group),
        ])  # fmt: skip

        def wait() -> Tensor:
            for work in works:
                work.wait()
            return received

        return wait

    def around(self, latents: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(rank, its latents)``, this rank's first. The next latents are sent in the meantime."""
        for step in range(self.size):
            coming = self.start(latents) if step < self.size - 1 else None
            yield (self.rank - step) % self.size, latents
            latents = coming() if coming else latents


class _LatentAttention(torch.autograd.Function):
    """(q [B,H,S,K], latents [L,B,R+P], or [n,L,B,R+P] after a gather) -> [B,H,S,V]."""

    @staticmethod
    def forward(ctx, q, latents, expand: Expand, group, scale, ring, *parameters):
        rank, size, length = group.rank(), group.size(), q.shape[2]
        blocks = _Ring(group).around(latents) if ring else ((s, latents[s]) for s in range(size))
        exact = compute_dtype(q)
        out, lse = None, q.new_full(q.shape[:3], -torch.inf, dtype=exact)
        for source, held in blocks:
            queries, keys, causal = spans(rank, source, length)
            k, v = expand(held, source)
            part, part_lse = attend(q[:, :, queries], k[:, :, keys], v[:, :, keys], causal, scale)
            if out is None:
                out = q.new_zeros(*q.shape[:3], v.shape[-1], dtype=exact)
            before = lse[:, :, queries]
            after = torch.logaddexp(before, part_lse)
            out[:, :, queries] = (
                out[:, :, queries] * (before - after).exp()[..., None]
                + part[..., : v.shape[-1]] * (part_lse - after).exp()[..., None]
            )
            lse[:, :, queries] = after
        out = out.to(q.dtype)
        ctx.save_for_backward(q, latents, out, lse, *parameters)
        ctx.expand, ctx.group, ctx.scale, ctx.ring = expand, group, scale, ring
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        q, latents, out, lse, *parameters = ctx.saved_tensors
        rank, size, length = ctx.group.rank(), ctx.group.size(), q.shape[2]
        ring = _Ring(ctx.group) if ctx.ring else None
        blocks = ring.around(latents) if ring else ((s, latents[s]) for s in range(size))
        exact = compute_dtype(q)
        d_q = torch.zeros_like(q, dtype=exact)
        d_parameters = [torch.zeros_like(p, dtype=exact) for p in parameters]
        d_all = None if ring else torch.zeros_like(latents, dtype=exact)
        travelling = None  # the gradient of the current latents, which is passed round with them, and one step further
        for source, held in blocks:
            queries, keys, causal = spans(rank, source, length)
            with torch.enable_grad():
                held = held.detach().requires_grad_()
                k, v = (x[:, :, keys] for x in ctx.expand(held, source))
            d_part, d_k, d_v = attend_backward(
                *(x[:, :, queries].contiguous() for x in (d_out, q)), k.detach(), v.detach(), out[:, :, queries],
                lse[:, :, queries].contiguous(), causal, ctx.scale,
            )  # fmt: skip
            d_q[:, :, queries] += d_part
            d_held, *d_used = torch.autograd.grad((k, v), (held, *parameters), (d_k.to(k.dtype), d_v.to(v.dtype)))
            for total, part in zip(d_parameters, d_used, strict=True):
                total += part
            if ring:
                travelling = d_held.to(exact) + (travelling() if travelling else 0.0)
                travelling = ring.start(travelling)
            else:
                d_all[source] += d_held
        d_latents = travelling() if ring else d_all
        d_parameters = [d.to(p.dtype) for d, p in zip(d_parameters, parameters, strict=True)]
        return d_q.to(q.dtype), d_latents.to(latents.dtype), None, None, None, None, *d_parameters


def latent_attention(q_BHSK: Tensor, latents_LBR: Tensor, expand: Expand, parameters: list[Tensor], group,
                     scale: float, ring: bool) -> Tensor:  # fmt: skip
    """Return the attention's output ``[B,H,S,V]``.

    ``expand`` makes keys and values of a rank's latents with ``parameters``, whose gradients are this rank's part.
    ``ring``: pass the latents round; otherwise gather those of all ranks first.
    """
    if not ring:
        latents_LBR = gather_from_sequence_parallel_region(latents_LBR, group=group).unflatten(0, (group.size(), -1))
    return _LatentAttention.apply(q_BHSK, latents_LBR, expand, group, scale, ring, *parameters)
