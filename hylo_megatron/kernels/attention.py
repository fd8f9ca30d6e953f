"""Softmax attention of queries to one block of keys, its gradient, and the joining of blocks.

Attention to some of the keys is an average of their values, and its denominator says how much it weighs. So blocks of
keys can be attended one after another, each by a fused kernel, and joined by their denominators afterwards.

On a GPU the kernel is the one that torch's ``scaled_dot_product_attention`` would choose (cuDNN's on Hopper, else
FlashAttention 2). Both take shared key heads as they are.

Legend: B batch, S queries, L keys, H query heads, G key heads (H / G query heads share one), K key, V value width.
``lse``: the natural logarithm of the denominators, ``[B,H,S]``, or ``[B,H,S,1]`` where cuDNN returns this shape.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

from hylo_megatron.errors import HyLoError

aten = torch.ops.aten


def _scores(q: Tensor, k: Tensor, causal: bool, scale: float) -> Tensor:
    scores = q @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).mT * scale
    return scores + torch.full_like(scores[0, 0], -torch.inf).triu_(1) if causal else scores


def attend_plain(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Compute ``attend`` with all scores in memory: the reference, and the version for fp32 on a GPU."""
    scores = _scores(q, k, causal, scale)
    return scores.softmax(-1) @ v.repeat_interleave(q.shape[1] // v.shape[1], 1), scores.logsumexp(-1)


def attend_plain_backward(d_out, q, k, v, out, lse, causal: bool, scale: float) -> tuple[Tensor, Tensor, Tensor]:
    """Compute ``attend_backward`` with all scores in memory."""
    groups, sharing = k.shape[1], q.shape[1] // k.shape[1]
    p = (_scores(q, k, causal, scale) - lse[..., None]).exp()
    d_p = d_out @ v.repeat_interleave(sharing, 1).mT
    d_scores = p * (d_p - (d_out * out).sum(-1, keepdim=True)) * scale
    d_k, d_v = (x.unflatten(1, (groups, sharing)).sum(2) for x in (d_scores.mT @ q, p.mT @ d_out))
    return d_scores @ k.repeat_interleave(sharing, 1), d_k, d_v


def _one_width(*parts: Tensor) -> list[Tensor]:
    """Return ``parts`` padded with zeros to one width, a multiple of 8, which flash attention on a GPU needs."""
    width = max(part.shape[-1] for part in parts)
    width += -width % 8
    return [part if part.shape[-1] == width else F.pad(part, (0, width - part.shape[-1])) for part in parts]


def _by_cudnn(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> bool:
    """Return whether ``scaled_dot_product_attention`` would take cuDNN's kernel."""
    choice = torch._fused_sdp_choice(
        q, k, v, None, 0.0, causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )  # fmt: skip
    return choice == SDPBackend.CUDNN_ATTENTION.value


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float) -> tuple[Tensor, Tensor]:
    """Return ``out [B,H,S,V]`` and ``lse``. ``causal`` needs as many queries as keys."""
    if q.is_cuda and q.dtype == torch.float32:
        return attend_plain(q, k, v, causal, scale)
    value_width = v.shape[-1]
    q, k, v = _one_width(q, k, v)
    if not q.is_cuda:
        out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, scale=scale)
    elif _by_cudnn(q, k, v, causal, scale):
        out, lse, *_ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True, 0.0, causal, scale=scale)
    else:
        out, lse, *_ = aten._scaled_dot_product_flash_attention(q, k, v, 0.0, causal, scale=scale)
    if lse.shape[:3] != q.shape[:3] or lse.numel() != q.shape[:3].numel():
        raise HyLoError(
            f"torch {torch.__version__}: the log-sum-exp of fused attention has the shape {list(lse.shape)}, expected"
            f" {list(q.shape[:3])}, with or without a last 1: train with --context-parallel-size 1, or another torch"
        )
    return out[..., :value_width], lse.contiguous()


def attend_backward(
    d_out: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, causal: bool, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of a block, given the output and the denominators of all blocks together."""
    if q.is_cuda and q.dtype == torch.float32:
        return attend_plain_backward(d_out, q, k, v, out, lse, causal, scale)
    key_width, value_width, lse = k.shape[-1], v.shape[-1], lse.contiguous()
    q, k, v, d_out, out = _one_width(q, k, v, d_out, out)
    if not q.is_cuda:
        d_q, d_k, d_v = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            d_out, q, k, v, out, lse, 0.0, causal, scale=scale
        )
        return d_q[..., :key_width], d_k[..., :key_width], d_v[..., :value_width]
    lengths = q.shape[2], k.shape[2], 0.0, causal
    nothing = torch.zeros(2, dtype=torch.uint64, device=q.device)  # without dropout there is no random state
    if _by_cudnn(q, k, v, causal, scale):
        # cuDNN's plan is cached by the strides of q, k and v, and assumes those that d_out and out had at first
        d_out, out = (x.permute(2, 0, 1, 3).contiguous().permute(1, 2, 0, 3) for x in (d_out, out))
        d_q, d_k, d_v = aten._scaled_dot_product_cudnn_attention_backward(
            d_out, q, k, v, out, lse, nothing[0], nothing[1], None, None, None, *lengths, scale=scale
        )
    else:
        d_q, d_k, d_v = aten._scaled_dot_product_flash_attention_backward(
            d_out, q, k, v, out, lse, None, None, *lengths, nothing, nothing[0], scale=scale
        )
    return d_q[..., :key_width], d_k[..., :key_width], d_v[..., :value_width]


def join_attention(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Add attention to further keys, ``part`` and ``part_lse``, to ``out`` and ``lse`` in place."""
    together = torch.logaddexp(lse, part_lse)
    before, new = ((x - together).exp().reshape(*out.shape[:3], 1) for x in (lse, part_lse))
    out.copy_(out * before + part * new)
    lse.copy_(together)
