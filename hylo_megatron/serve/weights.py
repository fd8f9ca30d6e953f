"""Tensors of an exported folder as vLLM's parameters: rules by name, and the padding to the served geometry.

Zeros are placed so that nothing else is touched: a rotary part of P dimensions padded to P' keeps its pairs
(i, i + P/2) as (i, i + P'/2), so that one table of frequencies, padded too, serves queries and keys.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylo_megatron.config import Geometry
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers import MIXERS


def pad(x: Tensor, dim: int, size: int) -> Tensor:
    """Return ``x`` with zeros behind it in ``dim``."""
    missing = size - x.shape[dim]
    return x if not missing else F.pad(x, [0, 0] * (x.dim() - 1 - dim % x.dim()) + [0, missing])


def spread(x: Tensor, dim: int, size: int) -> Tensor:
    """Return ``x`` with both halves of the rotary ``dim`` padded to halves of ``size``."""
    return torch.cat([pad(half, dim, size // 2) for half in x.chunk(2, dim)], dim)


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
    part: int | None = None
    pad: Callable[[Tensor, Sizes], Tensor] | None = None


@dataclass(frozen=True, kw_only=True)
class Padding:
    """From trained to served geometry, for a model with the mixers ``kinds`` and so many attention ``heads``."""

    trained: Geometry
    served: Geometry
    heads: int
    kinds: frozenset[str]

    def sizes(self, kind: str) -> Sizes:
        trained, served = (MIXERS[kind].dimensions(geometry) for geometry in (self.trained, self.served))
        return Sizes(trained=trained, served=served, heads=self.heads)


# Names behind ``model.layers.N.`` in every layer; a mixer's are in its vllm_weights.py.
_LAYER = {
    "mlp.gate_proj.weight": Rule("mlp.gate_up_proj.weight", 0),
    "mlp.up_proj.weight": Rule("mlp.gate_up_proj.weight", 1),
    "mlp.down_proj.weight": Rule(),
    "input_layernorm.weight": Rule(),
    "post_attention_layernorm.weight": Rule(),
}
_TOP = ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight")


def rules(kinds: Iterable[str]) -> dict[str, tuple[Rule, str]]:
    """Return the rule and the mixer of each name that a layer of one of ``kinds`` may have."""
    found = {name: (rule, "") for name, rule in _LAYER.items()}
    for kind in kinds:
        found |= {name: (rule, kind) for name, rule in MIXERS[kind].part("vllm_weights").RULES.items()}
    return found


def served_weights(
    weights: Iterable[tuple[str, Tensor]], padding: Padding
) -> Iterator[tuple[str, Tensor, int | None]]:
    """Yield ``(name in vLLM, tensor, part)`` for each ``(exported name, tensor)``.

    ``part`` says which one of a merged parameter it is. Raises ``HyLoError`` for names that no rule has.
    """
    known = rules(padding.kinds)
    for name, tensor in weights:
        if name in _TOP:
            yield name, tensor, None
            continue
        prefix, rest = _parts(name)
        if rest not in known:
            raise HyLoError(
                f"{name}: vLLM's model has no place for it; export the folder with convert_megatron_to_hf.py"
            )
        rule, kind = known[rest]
        with fits(name, tensor):
            served = rule.pad(tensor, padding.sizes(kind)) if rule.pad else tensor
        yield f"{prefix}{rule.name or rest}", served, rule.part


@contextmanager
def fits(name: str, tensor: Tensor) -> Iterator[None]:
    """Name the tensor when its shape is not the one that the model's sizes ask for."""
    try:
        yield
    except (AssertionError, RuntimeError, ValueError) as error:
        reason = str(error).split("\n")[0] or "another shape is expected"
        raise HyLoError(
            f"{name}: a tensor of shape {list(tensor.shape)} does not fit the sizes in config.json and --hf-overrides"
            f" ({reason}); weights and sizes must be those of one export"
        ) from error


def check_parts(loaded: set[tuple[str, int | None]], kinds: Iterable[str]) -> None:
    """Raise ``HyLoError`` for a merged parameter in ``loaded`` of which a part is missing."""
    known = rules(kinds)
    for prefix, target in sorted({_parts(name) for name, part in loaded if part is not None}):
        for rest, (rule, _) in known.items():
            if rule.name == target and (prefix + target, rule.part) not in loaded:
                raise HyLoError(f"{prefix}{rest} is missing from the folder: export it again")


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


def _parts(name: str) -> tuple[str, str]:
    """Return ``model.layers.N.`` and the rest of ``name``."""
    pieces = name.split(".", 3)
    return (".".join(pieces[:3]) + ".", pieces[3]) if len(pieces) == 4 else ("", name)
