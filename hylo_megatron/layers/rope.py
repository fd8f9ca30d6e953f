"""The rotation of queries and keys in training. Everything here is half-split ("rotate_half", neox) order: pair i is
made of dimensions i and i + d/2."""

import torch
from torch import Tensor

from hylo_megatron.kernels.rope import rope_frequencies

__all__ = ["apply_rope", "rope_frequencies"]


def apply_rope(x: Tensor, angles: Tensor, scaling: float = 1.0) -> Tensor:
    """Rotates ``x [S, B, H, d]`` by ``angles [S, 1, 1, d]`` (each frequency twice, as megatron lays them out)."""
    cos, sin = (angles.cos() * scaling).to(x.dtype), (angles.sin() * scaling).to(x.dtype)
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin
