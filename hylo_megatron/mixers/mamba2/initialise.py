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
    DATA,
    OPEN_GATE,
    OPEN_SILU,
    Choices,
    first_rows,
    identity_conv,
    inverse_softplus,
    linear_heads,
    random_conv,
    random_decay,
    repeated_qkv,
)
from hylo_megatron.mixers.mamba2.geometry import NORM_EPS

OUTPUT_PROJECTION = "mixer.out_proj.weight"
REFIT = True
_LINEAR_RANGE = 0.3  # rms of the scan's inputs: silu is nearly linear there, and the norm's eps still negligible


def from_rows(layer, arch: Architecture, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the paper's transfer (Mamba-in-the-Llama, arXiv 2408.15237): C from Q, B from K, x from V, out from O."""
    g = arch.geometry.mamba2
    q, k, v = repeated_qkv(layer, arch)
    inner, state = g.num_heads * g.head_dim, g.num_groups * g.state_size
    z, dt = ((torch.randn(n, arch.hidden_size, generator=generator) * 0.02).to(q) for n in (inner, g.num_heads))
    keys, queries = (first_rows(weight, g.num_groups, g.state_size) for weight in (k, q))
    rows = [z, first_rows(v, g.num_heads, g.head_dim), keys, queries, dt]
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


def _scan(q: Tensor, k: Tensor, v: Tensor, x_BSD: Tensor, times_ht: Tensor, _) -> Tensor:
    """Return the gated outputs ``[B,S,h,t,K]`` of the block's heads at every decay time."""
    features = [F.silu(torch.einsum("bsd,hkd->bshk", x_BSD, weight)) for weight in (v, k, q)]
    values, keys, queries = (f.repeat_interleave(times_ht.shape[1], 2) for f in features)
    steps = (1 / times_ht).flatten()
    out, _ = ssd_chunk_scan(values, steps.expand(*values.shape[:3]), -torch.ones_like(steps), keys, queries)
    return out.unflatten(2, (len(q), -1)) * OPEN_SILU


def calibrated(layer, arch: Architecture, frequencies: Tensor, choices: Choices = DATA) -> dict[str, Tensor]:
    """Return a Mamba-2 that starts as a decayed linear attention with the teacher's heads.

    ``choices`` change nothing: the block has no beta, and its norm, behind the gate, takes a head's size away.
    """
    g, dim = arch.geometry.mamba2, arch.head_dim
    if g.num_groups != g.num_heads or g.state_size != dim or g.head_dim != dim:
        raise HyLoError(f"--init {choices.name} for Mamba-2 needs one group a head and heads like the base model's"
                        " (--geometry native); use --init svd for other geometries")  # fmt: skip
    start = linear_heads(layer, arch, g.num_heads, _scan, eps=NORM_EPS, rms=_LINEAR_RANGE)
    inner, conv = g.num_heads * dim, (g.num_heads + 2 * g.num_groups) * dim
    rows = [
        (OPEN_GATE * start.one).expand(inner, -1),
        *(weight.flatten(0, 1) for weight in (start.v, start.k, start.q)),
        start.q.new_zeros(g.num_heads, arch.hidden_size),
    ]
    return {
        "mixer.in_proj.weight": torch.cat(rows),
        "mixer.conv1d.weight": identity_conv(conv, g.conv_kernel),
        "mixer.conv1d.bias": torch.zeros(conv),
        "mixer.A_log": torch.zeros(g.num_heads),
        "mixer.D": torch.zeros(g.num_heads),
        "mixer.dt_bias": start.dt_bias,
        "mixer.norm.weight": torch.ones(inner),
        "mixer.out_proj.weight": (start.out * start.factor[:, None]).flatten(1),
    }
