"""Fields of a hybrid's ``config.json``: their allowed values, and the defaults of ``HyLoConfig`` for missing ones.

No torch. The fields of a mixer's dimensions come from its folder.
"""

from collections.abc import Iterable
from typing import Any, Literal

from pydantic import ConfigDict
from typing_extensions import TypedDict

from hylo_megatron.config import positions
from hylo_megatron.config.architecture import MODEL_TYPES, Extra
from hylo_megatron.config.geometry import ALWAYS
from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import AtLeastZero, Dimension, Positive, check
from hylo_megatron.mixers import CACHED, LINEAR, MIXERS, Mixer
from hylo_megatron.mixers.dimensions import config_defaults, config_fields, config_types

HYBRID = (*CACHED, *LINEAR)  # the mixers that a hybrid may have
# A default for any of these would belong to another model, and the weights would fit nevertheless.
NEEDED = ("mixers", "num_attention_heads", "rms_norm_eps", "max_position_embeddings", "rope_parameters")

# Fields that are not a mixer's dimensions: (type, default).
_MODEL = {
    "vocab_size": (Dimension, 49152),
    "hidden_size": (Dimension, 576),
    "intermediate_size": (Dimension, 1536),
    "num_hidden_layers": (Dimension | None, None),
    "num_attention_heads": (Dimension, 9),
    "num_key_value_heads": (Dimension | None, None),
    "head_dim": (Dimension | None, None),
    "hidden_act": (Literal["silu"], "silu"),
    "rms_norm_eps": (Positive, 1e-5),
    "max_position_embeddings": (Dimension, 8192),
    "rope_parameters": (dict[str, Any], {"rope_type": "default", "rope_theta": 10000.0}),
    "tie_word_embeddings": (bool, False),
    "mixers": (list[Literal[HYBRID]] | None, None),
    "linear_type": (Literal[LINEAR] | None, None),
    "qk_norm": (bool, False),
    "mla_rope": (bool, positions.FIELDS["mla_rope"]),
    "linear_rope": (bool, positions.FIELDS["linear_rope"]),
    "log_scale": (positions.LogScale | None, positions.FIELDS["log_scale"]),
    "window": (positions.Window | None, positions.FIELDS["window"]),
    "base_model_type": (Literal[MODEL_TYPES], "llama"),
    "base_qk_norm": (bool, False),
    "attention_bias": (bool, False),
    "architecture_extra": (Extra | None, None),
    "initializer_range": (AtLeastZero, 0.02),
    "use_cache": (bool, True),
}
_TYPES = {name: kind for name, (kind, _) in _MODEL.items()}
DEFAULTS = {name: default for name, (_, default) in _MODEL.items()}
for _name in HYBRID:
    _TYPES |= config_types(MIXERS[_name])
    DEFAULTS |= config_defaults(MIXERS[_name])

_Values = TypedDict("_Values", _TYPES)
_Values.__pydantic_config__ = ConfigDict(extra="forbid")


def described(plan: Iterable[str]) -> list[Mixer]:
    """Return the mixers whose dimensions ``config.json`` has for the layers of ``plan``.

    These are the mixers of the first version, always, and later ones where a layer has them.
    """
    plan = set(plan)
    return [MIXERS[name] for name in HYBRID if name in ALWAYS or name in plan]


def fields(plan: Iterable[str]) -> list[str]:
    """Return the names of the fields of a model with the layers of ``plan``."""
    return [*_MODEL, *(field for entry in described(plan) for field in config_fields(entry))]


def check_values(values: dict) -> None:
    """Raise ``HyLoError`` that names the first field with another type or a value out of range."""
    check(values, _Values, "config.json")


def check_complete(config: dict) -> None:
    """Raise ``HyLoError`` for a file that lacks a field in which exported models differ."""
    if missing := [name for name in NEEDED if name not in config]:
        raise HyLoError(f"config.json: field {missing[0]} is missing; export the checkpoint again")
