"""Exported tensors as vLLM's parameters: what the mixers' ``vllm_weights.py`` share. No vLLM in here.

Zeros are placed so that nothing else is touched: a rotary part of P dimensions padded to P' keeps its pairs
(i, i + P/2) as (i, i + P'/2), so that one table of frequencies, padded too, serves queries and keys.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Dimensions of one mixer, trained and as vLLM runs them. ``heads``: of the model's attention."""

    trained: Any
    served: Any
    heads: int


@dataclass(frozen=True)
class Rule:
    """Where an exported tensor goes. ``name``: the parameter's name in vLLM, None if it has the same.

    ``part`` is the tensor's place in a merged parameter, and ``pad`` takes the tensor from trained to served sizes.
    """

    name: str | None = None
    part: int | str | None = None
    pad: Callable[[Tensor, Sizes], Tensor] | None = None


def same(*names: str) -> dict[str, Rule]:
    """Return rules for tensors of a linear mixer that have the same name in vLLM."""
    return {f"mixer.{name}": Rule() for name in names}


def merged(target: str, *names: str, pad: Callable[[Tensor, Sizes], Tensor] | None = None) -> dict[str, Rule]:
    """Return rules for weights of a linear mixer that are, in this order, the parts of one weight in vLLM."""
    return {f"mixer.{name}.weight": Rule(f"mixer.{target}.weight", part, pad) for part, name in enumerate(names)}


def pad(x: Tensor, dim: int, size: int) -> Tensor:
    """Return ``x`` with zeros behind it in ``dim``."""
    missing = size - x.shape[dim]
    return x if not missing else F.pad(x, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, missing])


def spread(x: Tensor, dim: int, size: int) -> Tensor:
    """Return ``x`` with both halves of the rotary ``dim`` padded to halves of ``size``."""
    return torch.cat([pad(half, dim, size // 2) for half in x.chunk(2, dim)], dim)


def conv_loader(sizes: list[int], ranks: int, rank: int):
    """Return a loader of a convolution's weights by parts. ``sizes``: channels of the parts on all ranks."""
    sizes = [size // ranks for size in sizes]

    def load(param: Tensor, loaded_weight: Tensor, part: int) -> None:  # vLLM's reload looks for these names
        target = param.data.narrow(0, sum(sizes[:part]), sizes[part])
        target.copy_(loaded_weight.narrow(0, rank * sizes[part], sizes[part]).view_as(target))

    return load


def keep_fp32(module: nn.Module, names: Iterable[str]) -> None:
    """Make parameters fp32 that vLLM makes in the model's dtype: rounding them changes every decay."""
    for name in names:
        parameter = getattr(module, name)
        if parameter.dtype != torch.float32:
            wide = nn.Parameter(parameter.data.float(), requires_grad=False)
            wide.weight_loader = parameter.weight_loader
            setattr(module, name, wide)
