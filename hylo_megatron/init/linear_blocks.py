"""Attention -> Gated DeltaNet or Mamba-2: the paper's row copy, and a start calibrated on activations.

Legend: B batch, S sequence, H query heads, G key-value heads, K head dim, D model.
The calibrated start makes the block a linear attention whose heads are the teacher's:
- convolutions are identities; SiLU is undone on values by ± pairs (``silu(z) - silu(-z) = z``) in GDN, and by inputs
  small enough for it to be linear in Mamba-2 (the gated norm behind it takes the scale out);
- output gates are open: ``silu(g)`` of a constant, which the data's constant direction supplies without a bias;
- each head's decay is the one, of a few, whose output correlates best with the teacher's head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.init.linear_algebra import constant_direction, linearised_qkv
from hylo_megatron.kernels import chunk_gated_delta_rule, ssd_chunk_scan

DECAY_TIMES = (3.0, 12.0, 48.0, 192.0, 768.0, 3072.0)  # tokens until a head's state has decayed to 1/e
OPEN_GATE = 2.0
_CALIBRATION_TOKENS = 2048  # enough to rank decays, which is all that the scans here are for


def _inverse_softplus(x: Tensor) -> Tensor:
    return x + torch.log(-torch.expm1(-x))


def _rows(weight_xKD: Tensor, count: int, dim: int) -> Tensor:
    """The first ``count`` heads of ``dim`` rows; zero rows where the base model has fewer."""
    flat = weight_xKD.flatten(0, -2)[: count * dim]
    return torch.cat([flat, flat.new_zeros(count * dim - len(flat), flat.shape[1])])


def _fresh_gdn(arch: Architecture, generator: torch.Generator) -> dict[str, Tensor]:
    """megatron's defaults for what the paper does not transfer."""
    g, d = arch.geometry.gdn, arch.hidden_size
    k, v, std = g.num_key_heads * g.key_head_dim, g.num_value_heads * g.value_head_dim, 0.02
    bound = g.conv_kernel**-0.5

    def normal(rows):
        return torch.randn(rows, d, generator=generator) * std

    def conv(rows):
        return (torch.rand(rows, 1, g.conv_kernel, generator=generator) * 2 - 1) * bound

    a = torch.empty(g.num_value_heads).uniform_(1, 16, generator=generator)
    return {
        "mixer.g_proj.weight": normal(v), "mixer.a_proj.weight": normal(g.num_value_heads),
        "mixer.b_proj.weight": normal(g.num_value_heads), "mixer.q_conv1d.weight": conv(k),
        "mixer.k_conv1d.weight": conv(k), "mixer.v_conv1d.weight": conv(v), "mixer.A_log": a.log(),
        "mixer.dt_bias": torch.ones(g.num_value_heads), "mixer.o_norm.weight": torch.ones(g.value_head_dim),
    }  # fmt: skip


def gdn_copy_init(layer, arch: Architecture, generator: torch.Generator) -> dict[str, Tensor]:
    """The paper's transfer: overlapping rows of Q, K, V and columns of O, key-value heads repeated to H."""
    g, repeat = arch.geometry.gdn, arch.num_attention_heads // arch.num_key_value_heads
    q, k, v = linearised_qkv(layer, arch)
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    out = layer["self_attn.o_proj.weight"]
    width = g.num_value_heads * g.value_head_dim
    columns = torch.cat([out[:, :width], out.new_zeros(len(out), max(0, width - out.shape[1]))], 1)
    return _fresh_gdn(arch, generator) | {
        "mixer.q_proj.weight": _rows(q, g.num_key_heads, g.key_head_dim),
        "mixer.k_proj.weight": _rows(k, g.num_key_heads, g.key_head_dim),
        "mixer.v_proj.weight": _rows(v, g.num_value_heads, g.value_head_dim),
        "mixer.o_proj.weight": columns,
    }


def mamba2_copy_init(layer, arch: Architecture, generator: torch.Generator) -> dict[str, Tensor]:
    """The paper's transfer (Mamba-in-the-Llama, arXiv 2408.15237): C from Q, B from K, x from V, out from O."""
    g, repeat = arch.geometry.mamba2, arch.num_attention_heads // arch.num_key_value_heads
    q, k, v = linearised_qkv(layer, arch)
    k, v = k.repeat_interleave(repeat, 0), v.repeat_interleave(repeat, 0)
    inner = g.num_heads * g.head_dim
    z = torch.randn(inner, arch.hidden_size, generator=generator) * 0.02
    dt = torch.randn(g.num_heads, arch.hidden_size, generator=generator) * 0.02
    rows = [z.to(q), _rows(v, g.num_heads, g.head_dim), _rows(k, g.num_groups, g.state_size),
            _rows(q, g.num_groups, g.state_size), dt.to(q)]  # fmt: skip
    conv, bound = inner + 2 * g.num_groups * g.state_size, g.conv_kernel**-0.5
    step = torch.exp(torch.rand(g.num_heads, generator=generator) * math.log(100) + math.log(1e-3))
    out = layer["self_attn.o_proj.weight"]
    return {
        "mixer.in_proj.weight": torch.cat(rows),
        "mixer.conv1d.weight": (torch.rand(conv, 1, g.conv_kernel, generator=generator) * 2 - 1) * bound,
        "mixer.conv1d.bias": (torch.rand(conv, generator=generator) * 2 - 1) * bound,
        "mixer.A_log": torch.empty(g.num_heads).uniform_(1, 16, generator=generator).log(),
        "mixer.D": torch.ones(g.num_heads), "mixer.dt_bias": _inverse_softplus(step),
        "mixer.norm.weight": torch.ones(inner),
        "mixer.out_proj.weight": out[:, :inner].clone(),
    }  # fmt: skip


def _choose_heads(layer, arch: Architecture, count: int) -> Tensor:
    """Base heads that the block's heads start from: all in order, else those that add most to the output."""
    heads = arch.num_attention_heads
    if count >= heads:
        return torch.arange(count) % heads
    out = layer["self_attn.o_proj.weight"].unflatten(1, (heads, -1))
    energy = layer.heads_BSHK.square().mean((0, 1)).sum(-1) * out.square().sum((0, 2))
    return energy.topk(count).indices.sort().values.cpu()


def _unit(weight_hKD: Tensor, x_BSD: Tensor) -> Tensor:
    """Scales each head's rows to unit mean square on the data."""
    out = torch.einsum("bsd,hkd->bshk", x_BSD, weight_hKD)
    return weight_hKD / out.square().mean((0, 1, 3)).sqrt().clamp_min(1e-6)[:, None, None]


def _calibration_rows(layer) -> slice:
    return slice(0, max(1, _CALIBRATION_TOKENS // layer.inputs_BSD.shape[1]))


def _best_decay(outputs_BSHtK: Tensor, target_BSHK: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Per head the index of the best decay and the factor that maps its normed output onto the target."""
    o = outputs_BSHtK * torch.rsqrt(outputs_BSHtK.square().mean(-1, keepdim=True) + eps)
    y = target_BSHK.unsqueeze(3)
    dot, power = (o * y).sum((0, 1, 4)), o.square().sum((0, 1, 4))
    best = (dot / power.sqrt().clamp_min(1e-9)).argmax(1)
    return best, (dot / power.clamp_min(1e-9)).gather(1, best[:, None])[:, 0]


def _identity_conv(rows: int, kernel: int) -> Tensor:
    weight = torch.zeros(rows, 1, kernel)
    weight[:, 0, -1] = 1.0
    return weight


def gdn_data_init(layer, arch: Architecture) -> dict[str, Tensor]:
    """Gated DeltaNet that starts as a decayed linear attention with the teacher's heads."""
    g, dim, heads = arch.geometry.gdn, arch.head_dim, arch.num_attention_heads
    if g.num_value_heads != 2 * g.num_key_heads or g.key_head_dim != dim or g.value_head_dim != dim:
        raise HyLoError("--init data for GDN needs heads like the base model's, two value heads a key head"
                        " (--geometry native); use --init svd for other geometries")  # fmt: skip
    q, k, v = linearised_qkv(layer, arch)
    device, chosen = q.device, _choose_heads(layer, arch, g.num_key_heads).to(q.device)
    group = chosen // (heads // arch.num_key_value_heads)
    calibration = _calibration_rows(layer)
    x = layer.inputs_BSD[calibration]
    q, k, v = _unit(q[chosen], x), _unit(k[group], x), _unit(v[group], x)

    def feature(weight, activation):
        out = torch.einsum("bsd,hkd->bshk", x, weight)
        return F.silu(out) if activation else out

    times = torch.tensor(DECAY_TIMES, device=device)
    values = feature(v, False).repeat_interleave(len(times), 2)
    decay = (-1 / times).repeat(len(chosen)).expand(*values.shape[:3])
    o, _ = chunk_gated_delta_rule(
        feature(q, True), feature(k, True), values, decay, torch.full_like(decay, 0.5), use_qk_l2norm_in_kernel=True
    )
    target = layer.heads_BSHK[calibration][:, :, chosen]
    best, factor = _best_decay(o.unflatten(2, (len(chosen), -1)), target, g.norm_eps or arch.rms_norm_eps)
    out = layer["self_attn.o_proj.weight"].unflatten(1, (heads, dim))[:, chosen]
    gate = F.silu(torch.tensor(OPEN_GATE)).item()
    half = out * (factor / (2 * gate))[:, None]
    one = constant_direction(layer.inputs_BSD.flatten(0, 1))
    key_rows, value_rows = g.num_key_heads * dim, g.num_value_heads * dim
    return {
        "mixer.q_proj.weight": q.flatten(0, 1), "mixer.k_proj.weight": k.flatten(0, 1),
        "mixer.v_proj.weight": torch.stack([v, -v], 1).flatten(0, 2),
        "mixer.g_proj.weight": (OPEN_GATE * one).expand(value_rows, -1).clone(),
        "mixer.a_proj.weight": torch.zeros(g.num_value_heads, arch.hidden_size),
        "mixer.b_proj.weight": torch.zeros(g.num_value_heads, arch.hidden_size),
        "mixer.q_conv1d.weight": _identity_conv(key_rows, g.conv_kernel),
        "mixer.k_conv1d.weight": _identity_conv(key_rows, g.conv_kernel),
        "mixer.v_conv1d.weight": _identity_conv(value_rows, g.conv_kernel),
        "mixer.A_log": torch.zeros(g.num_value_heads),
        "mixer.dt_bias": _inverse_softplus(1 / times[best]).repeat_interleave(2),
        "mixer.o_norm.weight": torch.ones(dim),
        "mixer.o_proj.weight": torch.stack([half, -half], 2).flatten(1),
    }  # fmt: skip


_LINEAR_RANGE = 0.3  # rms of Mamba-2's inputs: silu is nearly linear there, and the norm's eps still negligible


def mamba2_data_init(layer, arch: Architecture) -> dict[str, Tensor]:
    """Mamba-2 that starts as a decayed linear attention with the teacher's heads."""
    g, dim, heads = arch.geometry.mamba2, arch.head_dim, arch.num_attention_heads
    if g.num_groups != g.num_heads or g.state_size != dim or g.head_dim != dim:
        raise HyLoError("--init data for Mamba-2 needs one group a head and heads like the base model's"
                        " (--geometry native); use --init svd for other geometries")  # fmt: skip
    q, k, v = linearised_qkv(layer, arch)
    device, chosen = q.device, _choose_heads(layer, arch, g.num_heads).to(q.device)
    group = chosen // (heads // arch.num_key_value_heads)
    calibration = _calibration_rows(layer)
    x = layer.inputs_BSD[calibration]
    q, k, v = (_LINEAR_RANGE * _unit(w, x) for w in (q[chosen], k[group], v[group]))
    features = [F.silu(torch.einsum("bsd,hkd->bshk", x, w)) for w in (v, k, q)]
    times = torch.tensor(DECAY_TIMES, device=device)
    values, keys, queries = (f.repeat_interleave(len(times), 2) for f in features)
    steps = (1 / times).repeat(len(chosen))
    o, _ = ssd_chunk_scan(values, steps.expand(*values.shape[:3]), -torch.ones_like(steps), keys, queries)
    gate = F.silu(torch.tensor(OPEN_GATE)).item()
    target = layer.heads_BSHK[calibration][:, :, chosen]
    best, factor = _best_decay(o.unflatten(2, (len(chosen), -1)) * gate, target, 1e-5)
    one = constant_direction(layer.inputs_BSD.flatten(0, 1))
    inner, state = g.num_heads * dim, g.num_groups * dim
    rows = [(OPEN_GATE * one).expand(inner, -1), v.flatten(0, 1), k.flatten(0, 1), q.flatten(0, 1),
            one.new_zeros(g.num_heads, arch.hidden_size)]  # fmt: skip
    out = layer["self_attn.o_proj.weight"].unflatten(1, (heads, dim))[:, chosen] * factor[:, None]
    return {
        "mixer.in_proj.weight": torch.cat(rows),
        "mixer.conv1d.weight": _identity_conv(inner + 2 * state, g.conv_kernel),
        "mixer.conv1d.bias": torch.zeros(inner + 2 * state),
        "mixer.A_log": torch.zeros(g.num_heads), "mixer.D": torch.zeros(g.num_heads),
        "mixer.dt_bias": _inverse_softplus(1 / times[best]), "mixer.norm.weight": torch.ones(inner),
        "mixer.out_proj.weight": out.flatten(1),
    }  # fmt: skip
