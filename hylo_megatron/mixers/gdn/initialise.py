"""Attention -> Gated DeltaNet: the paper's row copy, and a start calibrated on activations.

Calibrated, SiLU is undone on values by ± pairs: ``silu(z) - silu(-z) = z``. Two value heads share each key head.
The legend and the rest of the method are in ``mixers/initialise.py``.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import chunk_gated_delta_rule
from hylo_megatron.kernels.rope import cos_and_sin, turn
from hylo_megatron.mixers.initialise import (
    DATA,
    OPEN_GATE,
    OPEN_SILU,
    OPEN_SLOPE,
    Choices,
    LinearHeads,
    first_rows,
    identity_conv,
    linear_heads,
    random_conv,
    random_decay,
    repeated_qkv,
)

OUTPUT_PROJECTION = "mixer.o_proj.weight"
REFIT = True


def from_rows(layer, arch: Architecture, generator: torch.Generator) -> dict[str, Tensor]:
    """Return the paper's transfer: overlapping rows of Q, K, V and columns of O, key-value heads repeated to H.

    The paper does not transfer the rest, which has megatron-core's defaults.
    """
    g, d = arch.geometry.gdn, arch.hidden_size
    q, k, v = repeated_qkv(layer, arch)
    out = layer["self_attn.o_proj.weight"]
    keys, values = g.num_key_heads * g.key_head_dim, g.num_value_heads * g.value_head_dim
    weights = {
        "mixer.q_proj.weight": first_rows(q, g.num_key_heads, g.key_head_dim),
        "mixer.k_proj.weight": first_rows(k, g.num_key_heads, g.key_head_dim),
        "mixer.v_proj.weight": first_rows(v, g.num_value_heads, g.value_head_dim),
        "mixer.o_proj.weight": torch.cat([out[:, :values], out.new_zeros(d, max(0, values - out.shape[1]))], 1),
        "mixer.A_log": random_decay(g.num_value_heads, generator),
        "mixer.dt_bias": torch.ones(g.num_value_heads),
        "mixer.o_norm.weight": torch.ones(g.value_head_dim),
    }
    for name, rows in {"g": values, "a": g.num_value_heads, "b": g.num_value_heads}.items():
        weights[f"mixer.{name}_proj.weight"] = torch.randn(rows, d, generator=generator) * 0.02
    for name, rows in {"q": keys, "k": keys, "v": values}.items():
        weights[f"mixer.{name}_conv1d.weight"] = random_conv(rows, g.conv_kernel, generator)
    return weights


def _scan(q, k, v, x_BSD: Tensor, times_ht: Tensor, betas_ht: Tensor, frequencies: Tensor | None) -> Tensor:
    """Return the outputs ``[B,S,h,t,K]`` of the block's heads at every decay time and beta.

    ``frequencies``: those by which queries and keys rotate, None where the block does not rotate them.
    """
    q_BShK, k_BShK, v_BShK = (torch.einsum("bsd,hkd->bshk", x_BSD, weight) for weight in (q, k, v))
    values = v_BShK.repeat_interleave(times_ht.shape[1], 2)
    decay, beta = ((part.flatten().expand(*values.shape[:3])) for part in (-1 / times_ht, betas_ht))
    q_BShK, k_BShK = F.silu(q_BShK), F.silu(k_BShK)
    if frequencies is not None:
        positions = torch.arange(x_BSD.shape[1], device=x_BSD.device)[:, None]
        angles = cos_and_sin(positions, frequencies.to(x_BSD.device), 1.0)  # a factor would go with the norm
        q_BShK, k_BShK = turn(q_BShK, *angles), turn(k_BShK, *angles)
    out, _ = chunk_gated_delta_rule(q_BShK, k_BShK, values, decay, beta, use_qk_l2norm_in_kernel=True)
    return out.unflatten(2, (len(q), -1))


def heads_of(layer, arch: Architecture, frequencies: Tensor, choices: Choices) -> LinearHeads:
    """Return the calibrated heads. Raises ``HyLoError`` for heads unlike the base model's."""
    g, dim = arch.geometry.gdn, arch.head_dim
    if g.num_value_heads != 2 * g.num_key_heads or g.key_head_dim != dim or g.value_head_dim != dim:
        raise HyLoError(f"--init {choices.name} for GDN needs heads like the base model's, two value heads a key head"
                        " (--geometry native); use --init svd for other geometries")  # fmt: skip
    scan = partial(_scan, frequencies=frequencies if arch.linear_rope else None)
    eps = g.norm_eps or arch.rms_norm_eps
    return linear_heads(layer, arch, g.num_key_heads, scan, eps=eps, choices=choices)


def calibrated(layer, arch: Architecture, frequencies: Tensor, choices: Choices = DATA) -> dict[str, Tensor]:
    """Return a Gated DeltaNet that starts as a decayed linear attention with the teacher's heads."""
    return weights_of(heads_of(layer, arch, frequencies, choices), arch)


def weights_of(start: LinearHeads, arch: Architecture) -> dict[str, Tensor]:
    g, dim = arch.geometry.gdn, arch.head_dim
    gate = OPEN_GATE * start.one + OPEN_SILU / OPEN_SLOPE * start.size
    half = start.out * (start.factor / (2 * OPEN_SILU))[:, None]
    key_rows, value_rows = g.num_key_heads * dim, g.num_value_heads * dim
    return {
        "mixer.q_proj.weight": start.q.flatten(0, 1),
        "mixer.k_proj.weight": start.k.flatten(0, 1),
        "mixer.v_proj.weight": torch.stack([start.v, -start.v], 1).flatten(0, 2),
        "mixer.g_proj.weight": gate.repeat_interleave(2 * dim, 0),
        "mixer.a_proj.weight": torch.zeros(g.num_value_heads, arch.hidden_size),
        "mixer.b_proj.weight": torch.outer(start.beta.logit(), start.one).repeat_interleave(2, 0),
        "mixer.q_conv1d.weight": identity_conv(key_rows, g.conv_kernel),
        "mixer.k_conv1d.weight": identity_conv(key_rows, g.conv_kernel),
        "mixer.v_conv1d.weight": identity_conv(value_rows, g.conv_kernel),
        "mixer.A_log": torch.zeros(g.num_value_heads),
        "mixer.dt_bias": start.dt_bias.repeat_interleave(2),
        "mixer.o_norm.weight": torch.ones(dim),
        "mixer.o_proj.weight": torch.stack([half, -half], 2).flatten(1),
    }
