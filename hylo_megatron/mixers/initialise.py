"""What the initialisations of several mixers share: statistics of a base layer, and linear attention from its heads.

A mixer's ``initialise.py`` has

    OUTPUT_PROJECTION    the name of its output projection
    REFIT                whether a ridge regression refits that projection on calibration data
    from_rows            weights that are copied or factorised, without data
    calibrated           weights that fit calibration data

``layer`` is an ``init.teacher.AttentionLayer``; weights have Hugging Face names without the layer's prefix.

Calibrated linear blocks start as a linear attention whose heads are the teacher's (``linear_heads``). Convolutions are
identities. Output gates are open: their input is a constant, which the data's constant direction supplies without a
bias. Each head's decay is the one, of a few, whose output correlates best with the output of the teacher's head.

Legend: N tokens, B batch, S sequence, H query heads, G key-value heads, K head dim, D model, h heads of the block,
t decay times.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config import Architecture

DECAY_TIMES = (3.0, 12.0, 48.0, 192.0, 768.0, 3072.0)  # tokens until a head's state has decayed to 1/e
OPEN_GATE = 2.0
OPEN_SILU = F.silu(torch.tensor(OPEN_GATE)).item()  # a gate at its start
_CALIBRATION_TOKENS = 2048  # enough to rank decays, which is all that the scans here are for


def covariance(x_ND: Tensor) -> Tensor:
    """Return the second moment ``E[x xᵀ]`` in fp64."""
    x = x_ND.double()
    return x.T @ x / len(x)


def constant_direction(x_ND: Tensor, ridge: float = 1e-3) -> Tensor:
    """Return ``w`` with ``x · w ≈ 1`` on the data: layers without biases hold a constant with it."""
    c = covariance(x_ND)
    c += ridge * c.diagonal().mean() * torch.eye(len(c), dtype=c.dtype, device=c.device)
    return torch.linalg.solve(c, x_ND.double().mean(0)).float()


def linearised_qkv(layer, arch: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``W_Q [H,K,D], W_K [G,K,D], W_V [G,K,D]`` such that ``W x`` stands for what attention uses.

    Biases are held by the constant direction of the data. A per-head norm (Qwen3) becomes its weight over the head's
    mean rms on the data. Without calibration data the biases are left out, and a norm becomes its weight alone.
    """
    heads, groups, dim = arch.num_attention_heads, arch.num_key_value_heads, arch.head_dim
    weights = {n: layer[f"self_attn.{n}_proj.weight"].clone() for n in "qkv"}
    has_data = layer.inputs_BSD.numel() > 0
    x = layer.inputs_BSD.flatten(0, 1) if has_data else None
    if arch.attention_bias and has_data:
        one = constant_direction(x)
        for n in "qkv":
            weights[n] += torch.outer(layer[f"self_attn.{n}_proj.bias"], one)
    shaped = [weights[n].view(count, dim, -1) for n, count in (("q", heads), ("k", groups), ("v", groups))]
    if arch.qk_norm:
        for i, n in enumerate("qk"):
            scale = layer[f"self_attn.{n}_norm.weight"]
            if has_data:
                out = torch.einsum("nd,hkd->nhk", x, shaped[i])
                shaped[i] = shaped[i] / out.square().mean((0, 2)).sqrt()[:, None, None]
            shaped[i] = shaped[i] * scale[:, None]
    return tuple(shaped)


def repeated_qkv(layer, arch: Architecture) -> tuple[Tensor, Tensor, Tensor]:
    """Return ``linearised_qkv`` with keys and values repeated for every query head."""
    q, k, v = linearised_qkv(layer, arch)
    repeat = arch.num_attention_heads // arch.num_key_value_heads
    return q, k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)


def inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


def first_rows(weight_xKD: Tensor, count: int, dim: int) -> Tensor:
    """Return the rows of the first ``count`` heads of ``dim``; zero rows where the base model has fewer."""
    flat = weight_xKD.flatten(0, -2)[: count * dim]
    return torch.cat([flat, flat.new_zeros(count * dim - len(flat), flat.shape[1])])


def choose_heads(layer, arch: Architecture, count: int) -> Tensor:
    """Return the base heads that the block's heads start from: all in order, or those that add most to the output."""
    heads = arch.num_attention_heads
    if count >= heads:
        return torch.arange(count) % heads
    out = layer["self_attn.o_proj.weight"].unflatten(1, (heads, -1))
    energy = layer.heads_BSHK.square().mean((0, 1)).sum(-1) * out.square().sum((0, 2))
    return energy.topk(count).indices.sort().values.cpu()


@dataclass(frozen=True, kw_only=True)
class LinearHeads:
    """A linear attention whose heads stand for the teacher's.

    ``q``, ``k``, ``v`` [h,K,D] and the columns ``out`` [D,h,K] of the output projection; ``factor`` [h] maps a head's
    normed output onto that of the teacher's head, and ``dt_bias`` [h] makes its decay. ``open_gate`` [D] is a row of a
    gate's projection that gives ``OPEN_GATE`` at every token.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    factor: Tensor
    dt_bias: Tensor
    open_gate: Tensor


def linear_heads(
    layer, arch: Architecture, count: int, scan: Callable, *, eps: float, rms: float = 1.0
) -> LinearHeads:
    """Return ``count`` heads whose queries, keys and values have the root mean square ``rms`` on the data.

    ``scan(q, k, v, x_BSD, times)`` returns the block's outputs before its norm with ``eps``, ``[B,S,h,t,K]``.
    """
    heads = arch.num_attention_heads
    q_HKD, k_GKD, v_GKD = linearised_qkv(layer, arch)
    chosen = choose_heads(layer, arch, count).to(q_HKD.device)
    group = chosen // (heads // arch.num_key_value_heads)
    rows = slice(0, max(1, _CALIBRATION_TOKENS // layer.inputs_BSD.shape[1]))
    x, times = layer.inputs_BSD[rows], torch.tensor(DECAY_TIMES, device=q_HKD.device)
    q, k, v = (rms * _unit_heads(w, x) for w in (q_HKD[chosen], k_GKD[group], v_GKD[group]))
    best, factor = _best_decay(scan(q, k, v, x, times), layer.heads_BSHK[rows][:, :, chosen], eps)
    return LinearHeads(
        q=q,
        k=k,
        v=v,
        out=layer["self_attn.o_proj.weight"].unflatten(1, (heads, -1))[:, chosen],
        factor=factor,
        dt_bias=inverse_softplus(1 / times[best]),
        open_gate=OPEN_GATE * constant_direction(layer.inputs_BSD.flatten(0, 1)),
    )


def _unit_heads(weight_hKD: Tensor, x_BSD: Tensor) -> Tensor:
    """Scale each head's rows so that its output has unit mean square on the data."""
    out = torch.einsum("bsd,hkd->bshk", x_BSD, weight_hKD)
    return weight_hKD / out.square().mean((0, 1, 3)).sqrt().clamp_min(1e-6)[:, None, None]


def _best_decay(outputs_BShtK: Tensor, target_BShK: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return per head the index of the best decay and the factor that maps its normed output onto the target."""
    o = outputs_BShtK * torch.rsqrt(outputs_BShtK.square().mean(-1, keepdim=True) + eps)
    y = target_BShK.unsqueeze(3)
    dot, power = (o * y).sum((0, 1, 4)), o.square().sum((0, 1, 4))
    best = (dot / power.sqrt().clamp_min(1e-9)).argmax(1)
    return best, (dot / power.clamp_min(1e-9)).gather(1, best[:, None])[:, 0]


def identity_conv(rows: int, kernel: int) -> Tensor:
    """Return a depthwise convolution that passes its input through."""
    weight = torch.zeros(rows, 1, kernel)
    weight[:, 0, -1] = 1.0
    return weight


def random_conv(rows: int, kernel: int, generator: torch.Generator) -> Tensor:
    """Return a depthwise convolution with torch's default initialisation."""
    return (torch.rand(rows, 1, kernel, generator=generator) * 2 - 1) * kernel**-0.5


def random_decay(heads: int, generator: torch.Generator) -> Tensor:
    """Return ``A_log``, the logarithms of decay rates between 1 and 16, as megatron-core draws them."""
    return torch.empty(heads).uniform_(1, 16, generator=generator).log()
