"""Attention -> Mamba-2: the paper's row copy, and a start calibrated on activations.

Calibrated, SiLU is undone on values by inputs small enough for it to be linear; the gated norm behind the scan takes
the scale out. The legend and the rest of the method are in ``mixers/initialise.py``.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import ssd_chunk_scan
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

OUTPUT_PROJECTION = "mixer.out_proj.weight"
REFIT = True
_LINEAR_RANGE = 0.3  # rms of the scan's inputs: silu is nearly linear there, and the norm's eps still negligible


def from_rows(layer, arch: Architecture, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the paper's transfer (Mamba-in-the-Llama, arXiv 2408.15237): C from Q, B from K, x from V, out from O."""
    g = arch.geometry.mamba2
    q, k, v = repeated_qkv(layer, arch)
    inner, state = g.num_heads * g.head_dim, g.num_groups * g.state_size
    z = torch.randn(inner, arch.hidden_size, generator=generator) * 0.02
    dt = torch.randn(g.num_heads, arch.hidden_size, generator=generator) * 0.02
    rows = [
        z.to(q),
        first_rows(v, g.num_heads, g.head_dim),
        first_rows(k, g.num_groups, g.state_size),
        first_rows(q, g.num_groups, g.state_size),
        dt.to(q),
    ]
    step = torch.exp(torch.rand(g.num_heads, generator=generator) * math.log(100) + math.log(1e-3))
    conv = inner + 2 * state
    conv_weight = random_conv(conv, g.conv_kernel, generator)
    conv_bias = (torch.rand(conv, generator=generator) * 2 - 1) * g.conv_kernel**-0.5
    return {
        "mixer.in_proj.weight": torch.cat(rows),
        "mixer.conv1d.weight": conv_weight,
        "mixer.conv1d.bias": conv_bias,
        "mixer.A_log": random_decay(g.num_heads, generator),
        "mixer.D": torch.ones(g.num_heads),
        "mixer.dt_bias": inverse_softplus(step),
        "mixer.norm.weight": torch.ones(inner),
        "mixer.out_proj.weight": layer["self_attn.o_proj.weight"][:, :inner].clone(),
    }


def _scan(q: Tensor, k: Tensor, v: Tensor, x_BSD: Tensor) -> Tensor:
    """Return the outputs ``[B,S,h,t,K]`` of the block's heads at every decay time."""
    features = [F.silu(torch.einsum("bsd,hkd->bshk", x_BSD, weight)) for weight in (v, k, q)]
    times = torch.tensor(DECAY_TIMES, device=x_BSD.device)
    values, keys, queries = (f.repeat_interleave(len(times), 2) for f in features)
    steps = (1 / times).repeat(len(q))
    out, _ = ssd_chunk_scan(values, steps.expand(*values.shape[:3]), -torch.ones_like(steps), keys, queries)
    return out.unflatten(2, (len(q), -1))


def calibrated(layer, arch: Architecture, frequencies: Tensor) -> dict[str, Tensor]:
    """Return a Mamba-2 that starts as a decayed linear attention with the teacher's heads."""
    g, dim, heads = arch.geometry.mamba2, arch.head_dim, arch.num_attention_heads
    if g.num_groups != g.num_heads or g.state_size != dim or g.head_dim != dim:
        raise HyLoError("--init data for Mamba-2 needs one group a head and heads like the base model's"
                        " (--geometry native); use --init svd for other geometries")  # fmt: skip
    q, k, v = linearised_qkv(layer, arch)
    chosen = choose_heads(layer, arch, g.num_heads).to(q.device)
    group, calibration = chosen // (heads // arch.num_key_value_heads), calibration_rows(layer)
    x = layer.inputs_BSD[calibration]
    q, k, v = (_LINEAR_RANGE * unit_heads(w, x) for w in (q[chosen], k[group], v[group]))
    gate = F.silu(torch.tensor(OPEN_GATE)).item()
    best, factor = best_decay(_scan(q, k, v, x) * gate, layer.heads_BSHK[calibration][:, :, chosen], 1e-5)
    one = constant_direction(layer.inputs_BSD.flatten(0, 1))
    times = torch.tensor(DECAY_TIMES, device=q.device)
    inner, state = g.num_heads * dim, g.num_groups * dim
    rows = [
        (OPEN_GATE * one).expand(inner, -1),
        v.flatten(0, 1),
        k.flatten(0, 1),
        q.flatten(0, 1),
        one.new_zeros(g.num_heads, arch.hidden_size),
    ]
    out = layer["self_attn.o_proj.weight"].unflatten(1, (heads, dim))[:, chosen] * factor[:, None]
    return {
        "mixer.in_proj.weight": torch.cat(rows),
        "mixer.conv1d.weight": identity_conv(inner + 2 * state, g.conv_kernel),
        "mixer.conv1d.bias": torch.zeros(inner + 2 * state),
        "mixer.A_log": torch.zeros(g.num_heads),
        "mixer.D": torch.zeros(g.num_heads),
        "mixer.dt_bias": inverse_softplus(1 / times[best]),
        "mixer.norm.weight": torch.ones(inner),
        "mixer.out_proj.weight": out.flatten(1),
    }
