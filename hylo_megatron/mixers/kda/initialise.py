"""Attention -> Kimi Delta Attention: rows of the base model's heads, and a start calibrated on activations.

With one decay for all channels of a head and a constant output gate, Kimi Delta Attention is a Gated DeltaNet, so the
calibrated start is the one of Gated DeltaNet. The second matrices of both bottlenecks start as zeros. That leaves the
decay to ``dt_bias`` and the gate at one half, and both learn from the first step on. Where sizes of heads were fitted,
each has a dimension of the gate's bottleneck.
"""

from dataclasses import replace

import torch
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers.gdn import initialise as gdn
from hylo_megatron.mixers.gdn.geometry import GDNGeometry
from hylo_megatron.mixers.initialise import (
    DATA,
    OPEN_SILU,
    Choices,
    inverse_softplus,
    random_conv,
    random_decay,
    repeated_qkv,
)

OUTPUT_PROJECTION = gdn.OUTPUT_PROJECTION
REFIT = gdn.REFIT
_STD = 0.02
_STEPS = (1e-3, 1e-1)  # Kimi Linear draws softplus(dt_bias) between them, evenly in the logarithm


def _bottlenecks(arch: Architecture, generator: torch.Generator) -> dict[str, Tensor]:
    g, parts = arch.geometry.kda, {}
    shapes = {"a": (g.head_dim, arch.hidden_size), "b": (g.num_heads * g.head_dim, g.head_dim)}
    for name in ("f_a", "f_b", "g_a", "g_b"):
        parts[f"mixer.{name}_proj.weight"] = torch.randn(*shapes[name[-1]], generator=generator) * _STD
    return parts


def from_rows(layer, arch: Architecture, generator: torch.Generator) -> dict[str, Tensor]:
    """Return rows of Q, K, V and columns of O, key-value heads repeated, and Kimi Linear's defaults for the rest.

    Where the block is wider than the base model's heads, it takes them again from the first on, and the copies share
    the columns of O.
    """
    g = arch.geometry.kda
    width, out = g.num_heads * g.head_dim, layer["self_attn.o_proj.weight"]
    taken = torch.arange(width, device=out.device) % out.shape[1]
    copies = torch.bincount(taken, minlength=out.shape[1])[taken]
    q, k, v = (rows.flatten(0, 1)[taken] for rows in repeated_qkv(layer, arch))
    low, high = (torch.tensor(step).log() for step in _STEPS)
    step = torch.exp(torch.rand(width, generator=generator) * (high - low) + low)
    return _bottlenecks(arch, generator) | {
        "mixer.q_proj.weight": q,
        "mixer.k_proj.weight": k,
        "mixer.v_proj.weight": v,
        "mixer.b_proj.weight": torch.randn(g.num_heads, arch.hidden_size, generator=generator) * _STD,
        "mixer.q_conv1d.weight": random_conv(width, g.conv_kernel, generator),
        "mixer.k_conv1d.weight": random_conv(width, g.conv_kernel, generator),
        "mixer.v_conv1d.weight": random_conv(width, g.conv_kernel, generator),
        "mixer.A_log": random_decay(g.num_heads, generator),
        "mixer.dt_bias": inverse_softplus(step),
        "mixer.o_norm.weight": torch.ones(g.head_dim),
        "mixer.o_proj.weight": out[:, taken] / copies,
    }


def calibrated(layer, arch: Architecture, frequencies: Tensor, choices: Choices = DATA) -> dict[str, Tensor]:
    """Return a Kimi Delta Attention that computes what a calibrated Gated DeltaNet of the same states computes."""
    g = arch.geometry.kda
    if g.num_heads % 2 or g.head_dim != arch.head_dim:
        raise HyLoError(f"--init {choices.name} for KDA needs heads like the base model's, in pairs"
                        " (--geometry native); use --init svd for other geometries")  # fmt: skip
    same = GDNGeometry(g.num_heads // 2, g.num_heads, g.head_dim, g.head_dim, g.conv_kernel, g.norm_eps)
    as_gdn = replace(arch, geometry=replace(arch.geometry, gdn=same))
    start = gdn.heads_of(layer, as_gdn, frequencies, choices)
    weights = gdn.weights_of(start, as_gdn)
    del weights["mixer.a_proj.weight"], weights["mixer.g_proj.weight"]
    for name in ("q_proj", "k_proj", "q_conv1d", "k_conv1d"):  # a copy for each value head that shared the key head
        heads = weights[f"mixer.{name}.weight"].unflatten(0, (-1, g.head_dim))
        weights[f"mixer.{name}.weight"] = heads.repeat_interleave(2, 0).flatten(0, 1)
    weights["mixer.dt_bias"] = weights["mixer.dt_bias"].repeat_interleave(g.head_dim)
    weights["mixer.o_proj.weight"] = weights["mixer.o_proj.weight"] * (2 * OPEN_SILU)
    bottlenecks = _bottlenecks(arch, torch.Generator().manual_seed(layer.index))
    for name in "fg":
        bottlenecks[f"mixer.{name}_b_proj.weight"].zero_()
    if choices.sizes:
        fitted = min(len(start.size), g.head_dim)
        bottlenecks["mixer.g_a_proj.weight"][:fitted] = 2 * start.size[:fitted]  # sigmoid(2 s) is (1 + s) / 2
        by_head = bottlenecks["mixer.g_b_proj.weight"].unflatten(0, (-1, 2 * g.head_dim))
        by_head[range(fitted), :, range(fitted)] = 1.0
    return weights | bottlenecks
