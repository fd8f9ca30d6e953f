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
With ``ATTENTION`` each head's beta is chosen together with its decay, and output gates follow the size of the
teacher's head. This size varies: a head that attends to the first token, where nothing else fits, gives almost
nothing, and the norm behind the recurrence takes sizes away.

Legend: N tokens, B batch, S sequence, H query heads, G key-value heads, K head dim, D model, h heads of the block,
t decay times.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config import Architecture

DECAY_TIMES = (3.0, 12.0, 48.0, 192.0, 768.0, 3072.0)  # tokens until a head's state has decayed to 1/e
OPEN_GATE = 2.0
OPEN_SILU = F.silu(torch.tensor(OPEN_GATE)).item()  # a gate at its start
OPEN_SLOPE = 1.0908  # the derivative of SiLU at OPEN_GATE
_SIZE_RIDGES = (0.1, 0.3, 1.0, 10.0)  # of regressions of a head's size, as shares of the hidden state's mean variance
_LEAST_MEAN = 0.25  # of a head's size, as a share of its root mean square, where changes are shares of the mean
_CALIBRATION_TOKENS = 2048  # enough to rank decays, which is all that the scans here are for


def covariance(x_ND: Tensor) -> Tensor:
    """Return the second moment ``E[x xᵀ]`` in fp64."""
    x = x_ND.double()
    return x.T @ x / len(x)


def constant_direction(x_ND: Tensor, ridge: float = 1e-3) -> Tensor:
    """Return ``w`` with ``x · w ≈ 1`` on the data: layers without biases hold a constant with it."""
    return ridge_solve(covariance(x_ND), x_ND.double().mean(0), ridge).float()


def ridge_solve(gram_FF: Tensor, moment_Fh: Tensor, ridge: float) -> Tensor:
    """Return a ridge regression's weights ``[F,h]``. ``ridge`` is a share of the mean second moment of a feature."""
    unit = torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    return torch.linalg.solve(gram_FF + ridge * gram_FF.diagonal().mean() * unit, moment_Fh)


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
class Choices:
    """What a calibrated linear block is fitted with beside decays.

    ``name``: that of the start, as ``--init`` takes it. ``betas``: the strengths of the delta rule's update that a
    head chooses from. ``sizes``: output gates follow the size of the teacher's heads.
    """

    name: str = "data"
    betas: tuple[float, ...] = (0.5,)
    sizes: bool = False


DATA = Choices()
ATTENTION = Choices(name="attention", betas=(0.03, 0.1, 0.3, 0.8), sizes=True)


@dataclass(frozen=True, kw_only=True)
class LinearHeads:
    """A linear attention whose heads stand for the teacher's.

    ``q``, ``k``, ``v`` [h,K,D] and the columns ``out`` [D,h,K] of the output projection; ``factor`` [h] maps a head's
    normed output onto that of the teacher's head, ``dt_bias`` [h] makes its decay, and ``beta`` [h] is that of the
    delta rule. ``one`` [D] gives 1 at every token. ``size`` [h,D] gives how much larger the teacher's head is at a
    token than ``factor`` says, as a share of ``factor``; it is zero if sizes were not fitted.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    out: Tensor
    factor: Tensor
    dt_bias: Tensor
    beta: Tensor
    one: Tensor
    size: Tensor


def linear_heads(
    layer, arch: Architecture, count: int, scan: Callable, *, eps: float, rms: float = 1.0, choices: Choices = DATA
) -> LinearHeads:
    """Return ``count`` heads whose queries, keys and values have the root mean square ``rms`` on the data.

    ``scan(q, k, v, x_BSD, times_ht, betas_ht)`` returns the block's outputs before its norm with ``eps``,
    ``[B,S,h,t,K]``.
    """
    heads = arch.num_attention_heads
    q_HKD, k_GKD, v_GKD = linearised_qkv(layer, arch)
    chosen = choose_heads(layer, arch, count).to(q_HKD.device)
    group = chosen // (heads // arch.num_key_value_heads)
    rows = slice(0, max(1, _CALIBRATION_TOKENS // layer.inputs_BSD.shape[1]))
    x, times = layer.inputs_BSD[rows], torch.tensor(DECAY_TIMES, device=q_HKD.device)
    q, k, v = (rms * _unit_heads(w, x) for w in (q_HKD[chosen], k_GKD[group], v_GKD[group]))
    one, target = constant_direction(layer.inputs_BSD.flatten(0, 1)), layer.heads_BSHK[:, :, chosen]
    grid, found = times.expand(count, -1), []
    for beta in choices.betas:  # one at a time, for the memory
        outputs = scan(q, k, v, x, grid, torch.full_like(grid, beta))
        found.append(_match(outputs, target[rows], eps))
    correlation, factors = (torch.cat(part, 1) for part in zip(*found, strict=True))
    best = correlation.argmax(1)
    time, beta = times[best % len(times)], torch.tensor(choices.betas, device=times.device)[best // len(times)]
    factor = factors.gather(1, best[:, None])[:, 0]
    size = torch.zeros(count, arch.hidden_size, device=times.device)
    if choices.sizes:
        rows_of_outputs = (scan(q, k, v, x[None], time[:, None], beta[:, None]) for x in layer.inputs_BSD)
        size = _size(layer.inputs_BSD, rows_of_outputs, target, factor, one, eps)
    return LinearHeads(
        q=q,
        k=k,
        v=v,
        out=layer["self_attn.o_proj.weight"].unflatten(1, (heads, -1))[:, chosen],
        factor=factor,
        dt_bias=inverse_softplus(1 / time),
        beta=beta,
        one=one,
        size=size,
    )


def _unit_heads(weight_hKD: Tensor, x_BSD: Tensor) -> Tensor:
    """Scale each head's rows so that its output has unit mean square on the data."""
    out = torch.einsum("bsd,hkd->bshk", x_BSD, weight_hKD)
    return weight_hKD / out.square().mean((0, 1, 3)).sqrt().clamp_min(1e-6)[:, None, None]


def _normed(outputs: Tensor, eps: float) -> Tensor:
    return outputs * torch.rsqrt(outputs.square().mean(-1, keepdim=True) + eps)


def _match(outputs_BShtK: Tensor, target_BShK: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the correlation of each normed output with the target, and the factor that maps it there ``[h,t]``.

    Correlations leave out the target's norm, so they compare outputs of one head only.
    """
    o, y = _normed(outputs_BShtK, eps), target_BShK.unsqueeze(3)
    dot, power = (o * y).sum((0, 1, 4)), o.square().sum((0, 1, 4))
    return dot / power.sqrt().clamp_min(1e-9), dot / power.clamp_min(1e-9)


def _size(x_BSD, outputs: Iterable[Tensor], target_BShK, factor_h: Tensor, one_D: Tensor, eps: float) -> Tensor:
    """Return ``LinearHeads.size``: the ridge regression of the factor that suits each token on ``x`` without its mean.

    ``outputs``: the block's ``[1,S,h,1,K]`` for each row of ``x``.
    """
    sizes = []
    for out, y_ShK in zip(outputs, target_BShK, strict=True):
        o = _normed(out[0, :, :, 0], eps)
        sizes.append((o * y_ShK).sum(-1) / o.square().sum(-1).clamp_min(1e-9))
    size_Nh, x = torch.cat(sizes).double(), x_BSD.flatten(0, 1).double()
    least = _LEAST_MEAN * size_Nh.square().mean(0).sqrt()
    mean = factor_h.sign() * torch.maximum(factor_h.abs(), least)
    centre = x.mean(0)
    change_hD = _ridge_by_head(x - centre, (size_Nh - factor_h) / mean, len(x_BSD))
    return (change_hD - torch.outer(change_hD @ centre, one_D.double())).float()


def _ridge_by_head(x_ND: Tensor, y_Nh: Tensor, rows: int) -> Tensor:
    """Return the ridge regression ``[h,D]`` of each head, with the strength that is best on the last quarter of rows.

    It is zero for a head that no strength helps there.
    """
    cut = len(x_ND) * max(1, rows * 3 // 4) // rows
    tried, x, y = torch.stack(list(_ridges(x_ND[:cut], y_Nh[:cut]))), x_ND[cut:], y_Nh[cut:]  # [r,h,D]
    left = torch.stack([(y - x @ w.T).square().sum(0) for w in (torch.zeros_like(tried[0]), *tried)])
    best = left.argmin(0)
    found = torch.stack([torch.zeros_like(tried[0]), *_ridges(x_ND, y_Nh)])
    return found[best, torch.arange(len(best), device=best.device)]


def _ridges(x_ND: Tensor, y_Nh: Tensor) -> Iterator[Tensor]:
    """Yield the regression ``[h,D]`` with each of the strengths."""
    gram, moment = x_ND.T @ x_ND, x_ND.T @ y_Nh
    for ridge in _SIZE_RIDGES:
        yield ridge_solve(gram, moment, ridge).T


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
