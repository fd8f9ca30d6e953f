"""Tensors of an exported folder as vLLM's parameters: each layer's rules, and what is missing or does not fit."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from torch import Tensor

from hylo_megatron.config import Geometry
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers import MIXERS
from hylo_megatron.mixers.vllm_weights import Rule, Sizes


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


def _window(mixer: str) -> dict[str, Rule]:
    """Return the rules of a window beside the layer's part ``mixer``."""
    merged = {
        f"{mixer}.window.{part}_proj.{kind}": Rule(f"{mixer}.window.qkv_proj.{kind}", part)
        for part in "qkv"
        for kind in ("weight", "bias")
    }
    return merged | {f"{mixer}.window.{name}.weight": Rule() for name in ("o_proj", "gate_proj", "q_norm", "k_norm")}


def rules(kinds: Iterable[str]) -> dict[str, tuple[Rule, str]]:
    """Return the rule and the mixer of each name that a layer of one of ``kinds`` may have."""
    found = {name: (rule, "") for name, rule in _LAYER.items()}
    for kind in kinds:
        entry = MIXERS[kind]
        found |= {name: (rule, "") for name, rule in _window(entry.module).items()}
        found |= {name: (rule, kind) for name, rule in entry.part("vllm_weights").RULES.items()}
    return found


def served_weights(
    weights: Iterable[tuple[str, Tensor]], padding: Padding
) -> Iterator[tuple[str, Tensor, int | str | None]]:
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
            raise HyLoError(f"{name}: vLLM's model has no place for it; export the folder with hylo export")
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


def check_parts(loaded: set[tuple[str, int | str | None]], kinds: Iterable[str]) -> None:
    """Raise ``HyLoError`` for a merged parameter in ``loaded`` of which a part is missing."""
    known = rules(kinds)
    for prefix, target in sorted({_parts(name) for name, part in loaded if part is not None}):
        for rest, (rule, _) in known.items():
            if rule.name == target and (prefix + target, rule.part) not in loaded:
                raise HyLoError(f"{prefix}{rest} is missing from the folder: export it again")


def _parts(name: str) -> tuple[str, str]:
    """Return ``model.layers.N.`` and the rest of ``name``."""
    pieces = name.split(".", 3)
    return (".".join(pieces[:3]) + ".", pieces[3]) if len(pieces) == 4 else ("", name)
