"""Rotary embeddings of training, transformers and vLLM: frequencies, their cosines and sines, the rotation.

Half-split ("rotate_half", neox) order: pair i consists of dimensions i and i + d/2.
"""

import functools
import json
import math
from typing import NamedTuple

import torch
from torch import Tensor

from hylo_megatron.config.positions import LogScale
from hylo_megatron.config.rope import checked_rope
from hylo_megatron.errors import HyLoError


@functools.lru_cache
def _frequencies(parameters: str, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    rope = checked_rope(json.loads(parameters), max_positions, "rotary embedding")
    if (kind := rope["rope_type"]) == "default":
        exponents = torch.arange(0, head_dim, 2, dtype=torch.float32, device="cpu") / head_dim
        return 1.0 / rope["rope_theta"] ** exponents, 1.0
    config = LlamaConfig(
        hidden_size=head_dim, num_attention_heads=1, head_dim=head_dim,
        max_position_embeddings=max_positions, rope_parameters=rope,
    )  # fmt: skip
    return ROPE_INIT_FUNCTIONS[kind](config, device="cpu")


def rope_frequencies(rope_parameters: dict, head_dim: int, max_positions: int) -> tuple[Tensor, float]:
    """Return ``(inverse frequencies [head_dim / 2], attention scaling of cos and sin)``, fp32. Raises ``HyLoError``.

    They are computed on the CPU, whatever the default device is, so that every machine has the same bits.
    """
    try:
        frequencies, scaling = _frequencies(json.dumps(rope_parameters, sort_keys=True), head_dim, max_positions)
    except ArithmeticError:
        frequencies, scaling = torch.full((1,), math.nan), math.nan
    real = type(frequencies) is Tensor  # a stand-in without numbers (torch's FakeTensor) cannot be checked
    if not math.isfinite(scaling) or (real and not frequencies.isfinite().all()):
        raise HyLoError(f"rotary embedding: {rope_parameters} gives frequencies that are not finite numbers")
    return frequencies.clone().float(), float(scaling)


def cos_and_sin(positions: Tensor, frequencies: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return cosines and sines ``[..., P]`` of positions ``[...]`` for P frequencies, fp32."""
    angles = positions[..., None].float() * frequencies
    return angles.cos() * scaling, angles.sin() * scaling


class Angles(NamedTuple):
    """What the layers of exported models read of positions, fp32. None: the model has no such setting.

    ``cos`` and ``sin`` rotate queries and keys of MLA, and ``scale`` multiplies its queries. ``linear_cos`` and
    ``linear_sin`` rotate queries and keys of linear layers. ``window`` is for the windows beside them in vLLM
    (``Positions`` of ``mixers/vllm_window.py``). ``key_cos`` and ``key_sin`` are of all cached tokens and the new
    ones, where transformers' MLA caches keys that are not rotated (``qk_norm``).
    """

    cos: Tensor | None
    sin: Tensor | None
    scale: Tensor | None
    linear_cos: Tensor | None = None
    linear_sin: Tensor | None = None
    window: tuple[Tensor, ...] | None = None
    key_cos: Tensor | None = None
    key_sin: Tensor | None = None


def query_scale(positions: Tensor, log_scale: LogScale) -> Tensor:
    """Return ``[..., 1]``, by what MLA's queries at positions ``[...]`` are multiplied (``config/positions.py``)."""
    base, length = log_scale["base"], log_scale["length"]
    return torch.log(positions[..., None].float().clamp_min(length) + base) / math.log(length + base)


def scaled(x: Tensor, scale: Tensor) -> Tensor:
    """Return ``x * scale``, computed in fp32 or wider, in the dtype of ``x``."""
    return (x.to(torch.promote_types(x.dtype, torch.float32)) * scale).to(x.dtype)


def turn(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the P = d/2 pairs of ``x [..., d]`` in fp32. ``cos`` and ``sin`` broadcast to ``[..., P]``."""
    first, second = (half.to(torch.promote_types(x.dtype, torch.float32)) for half in x.chunk(2, -1))
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def rotate(x_SBHd: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """Rotate ``x`` by the angles whose cosines and sines are given, fp32: the layout of training."""
    return turn(x_SBHd, cos_SP[:, None, None], sin_SP[:, None, None])
