"""Attention -> Gated DeltaNet: the paper's row copy, and a start calibrated on activations.

Calibrated, SiLU is undone on values by ± pairs: ``silu(z) - silu(-z) = z``. Two value heads share each key head.
The legend and the rest of the method are in ``mixers/initialise.py``.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import chunk_gated_delta_rule
from hylo_megatron.mixers.initialise import (
    DECAY_TIMES,
    OPEN_GATE,
    best_decay,
    calibration_rows,
    choose_heads,
    constant_direction,
    first_rows,
    identity_conv,
    inverse_softplus,
    linearised_qkv,
    random_conv,
    random_decay,
    repeated_qkv,
    unit_heads,
)

OUTPUT_PROJECTION = "mixer.o_proj.weight"
REFIT = True


def _fresh(arch: Architecture, generator: torch.Generator) -> dict[str, Tensor]:
    """Return megatron-core's defaults for what the paper does not transfer."""
    g, d = arch.geometry.gdn, arch.hidden_size
    k, v = g.num_key_heads * g.key_head_dim, g.num_value_heads * g.value_head_dim

    def normal(rows):
        return torch.randn(rows, d, generator=generator) * 0.02

    a_log = random_decay(g.num_value_heads, generator)
    return {
        "mixer.g_proj.weight": normal(v),
        "mixer.a_proj.weight": normal(g.num_value_heads),
        "mixer.b_proj.weight": normal(g.num_value_heads),
        "mixer.q_conv1d.weight": random_conv(k, g.conv_kernel, generator),
        "mixer.k_conv1d.weight": random_conv(k, g.conv_kernel, generator),
        "mixer.v_conv1d.weight": random_conv(v, g.conv_kernel, generator),
        "mixer.A_log": a_log,
        "mixer.dt_bias": torch.ones(g.num_value_heads),
        "mixer.o_norm.weight": torch.ones(g.value_head_dim),
    }


def from_rows(layer, arch: Architecture, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the paper's transfer: overlapping rows of Q, K, V and columns of O, key-value heads repeated to H."""
    g = arch.geometry.gdn
    q, k, v = repeated_qkv(layer, arch)
    out = layer["self_attn.o_proj.weight"]
    width = g.num_value_heads * g.value_head_dim
    columns = torch.cat([out[:, :width], out.new_zeros(len(out), max(0, width - out.shape[1]))], 1)
    return _fresh(arch, generator) | {
        "mixer.q_proj.weight": first_rows(q, g.num_key_heads, g.key_head_dim),
        "mixer.k_proj.weight": first_rows(k, g.num_key_heads, g.key_head_dim),
        "mixer.v_proj.weight": first_rows(v, g.num_value_heads, g.value_head_dim),
        "mixer.o_proj.weight": columns,
    }


def _scan(q: Tensor, k: Tensor, v: Tensor, x_BSD: Tensor) -> Tensor:
    """Return the outputs ``[B,S,h,t,K]`` of the block's heads at every decay time."""

    def feature(weight_hKD):
        return torch.einsum("bsd,hkd->bshk", x_BSD, weight_hKD)

    times = torch.tensor(DECAY_TIMES, device=x_BSD.device)
    values = feature(v).repeat_interleave(len(times), 2)
    decay = (-1 / times).repeat(len(q)).expand(*values.shape[:3])
    half = torch.full_like(decay, 0.5)  # beta
    out, _ = chunk_gated_delta_rule(
        F.silu(feature(q)), F.silu(feature(k)), values, decay, half, use_qk_l2norm_in_kernel=True
    )
    return out.unflatten(2, (len(q), -1))


def calibrated(layer, arch: Architecture, frequencies: Tensor) -> dict[str, Tensor]:
    """Return a Gated DeltaNet that starts as a decayed linear attention with the teacher's heads."""
    g, dim, heads = arch.geometry.gdn, arch.head_dim, arch.num_attention_heads
    if g.num_value_heads != 2 * g.num_key_heads or g.key_head_dim != dim or g.value_head_dim != dim:
        raise HyLoError("--init data for GDN needs heads like the base model's, two value heads a key head"
                        " (--geometry native); use --init svd for other geometries")  # fmt: skip
    q, k, v = linearised_qkv(layer, arch)
    chosen = choose_heads(layer, arch, g.num_key_heads).to(q.device)
    group, calibration = chosen // (heads // arch.num_key_value_heads), calibration_rows(layer)
    x = layer.inputs_BSD[calibration]
    q, k, v = unit_heads(q[chosen], x), unit_heads(k[group], x), unit_heads(v[group], x)
    target = layer.heads_BSHK[calibration][:, :, chosen]
    best, factor = best_decay(_scan(q, k, v, x), target, g.norm_eps or arch.rms_norm_eps)
    out = layer["self_attn.o_proj.weight"].unflatten(1, (heads, dim))[:, chosen]
    gate = F.silu(torch.tensor(OPEN_GATE)).item()
    half = out * (factor / (2 * gate))[:, None]
    one = constant_direction(layer.inputs_BSD.flatten(0, 1))
    times = torch.tensor(DECAY_TIMES, device=q.device)
    key_rows, value_rows = g.num_key_heads * dim, g.num_value_heads * dim
    return {
        "mixer.q_proj.weight": q.flatten(0, 1),
        "mixer.k_proj.weight": k.flatten(0, 1),
        "mixer.v_proj.weight": torch.stack([v, -v], 1).flatten(0, 2),
        "mixer.g_proj.weight": (OPEN_GATE * one).expand(value_rows, -1).clone(),
        "mixer.a_proj.weight": torch.zeros(g.num_value_heads, arch.hidden_size),
        "mixer.b_proj.weight": torch.zeros(g.num_value_heads, arch.hidden_size),
        "mixer.q_conv1d.weight": identity_conv(key_rows, g.conv_kernel),
        "mixer.k_conv1d.weight": identity_conv(key_rows, g.conv_kernel),
        "mixer.v_conv1d.weight": identity_conv(value_rows, g.conv_kernel),
        "mixer.A_log": torch.zeros(g.num_value_heads),
        "mixer.dt_bias": inverse_softplus(1 / times[best]).repeat_interleave(2),
        "mixer.o_norm.weight": torch.ones(dim),
        "mixer.o_proj.weight": torch.stack([half, -half], 2).flatten(1),
    }
