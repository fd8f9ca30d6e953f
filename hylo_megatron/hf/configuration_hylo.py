"""``HyLoConfig``: the description of a hybrid, saved as ``config.json``."""

from pathlib import Path

from transformers.configuration_utils import PretrainedConfig

from hylo_megatron.config import Architecture, Geometry, positions
from hylo_megatron.config.architecture import misfit
from hylo_megatron.config.rope import checked_rope
from hylo_megatron.errors import HyLoError
from hylo_megatron.hf import code_beside
from hylo_megatron.hf.config_values import DEFAULTS, HYBRID, check_complete, check_values, described, fields
from hylo_megatron.mixers import CACHED, LINEAR, MIXERS
from hylo_megatron.mixers.dimensions import config_to_geometry, geometry_to_config

_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id")
# Fields with the same name and value in ``config.json`` and in ``Architecture``.
_SHARED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "max_position_embeddings",
    "rope_parameters",
    "tie_word_embeddings",
    "attention_bias",
    *positions.FIELDS,
)
# Field of ``config.json`` -> field of ``Architecture``.
_RENAMED = {"base_model_type": "model_type", "base_qk_norm": "qk_norm", "qk_norm": "mla_qk_norm"}


class HyLoConfig(PretrainedConfig):
    """Configuration of a hybrid. Its keyword arguments are the fields of ``config_values.py``.

    ``mixers`` names each layer's mixer; ``layer_types`` is derived from it for transformers and vLLM.
    ``rope_parameters``, ``rms_norm_eps`` and the MLP sizes are the base model's. ``qk_norm``: per-head RMSNorm on
    MLA's queries and keys. ``config/positions.py`` explains ``mla_rope``, ``linear_rope``, ``log_scale`` and
    ``window``.
    ``linear_norm_eps``: of Gated DeltaNet's output norm, if another than ``rms_norm_eps``.
    ``base_*``, ``num_key_value_heads``, ``head_dim`` and ``attention_bias`` describe the base model's attention, which
    only a ``window`` computes with. ``architecture_extra`` belongs to training; nothing here computes with it.
    """

    model_type = "hylo"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(self, **kwargs):
        values = {name: kwargs.pop(name, default) for name, default in DEFAULTS.items()}
        kwargs.pop("layer_types", None)
        check_values(values)
        mixers = _mixers(values)
        linear = _linear_kind(mixers)
        for name in fields(mixers):
            setattr(self, name, values[name])
        self.mixers, self.num_hidden_layers = mixers, len(mixers)
        self.linear_type = linear or values["linear_type"] or LINEAR[0]
        self.layer_types = ["linear_attention" if MIXERS[kind].linear else "full_attention" for kind in mixers]
        self.num_key_value_heads = self.num_key_value_heads or self.num_attention_heads
        self.head_dim = self.head_dim or self.hidden_size // self.num_attention_heads
        self.rope_parameters = checked_rope(
            self.rope_parameters, self.max_position_embeddings, "config.json: rope_parameters"
        )
        self.architecture_extra = dict(self.architecture_extra or {})
        self.check()
        super().__init__(**kwargs)

    def check(self) -> None:
        """Raise ``HyLoError`` for values that no model can compute with.

        ``from_pretrained(folder, name=value)`` changes fields of a config that exists already.
        """
        check_values(DEFAULTS | {name: getattr(self, name) for name in fields(self.mixers)})
        if reason := misfit(self.to_architecture()):
            raise HyLoError(f"config.json: {reason}")

    @classmethod
    def from_dict(cls, config_dict: dict, **kwargs):
        """Return the config of a file, for ``from_pretrained``.

        The file has everything that the model computes with.
        """
        try:
            check_complete(config_dict)
            return super().from_dict(config_dict, **kwargs)
        except HyLoError as error:
            said = str(error)
        except Exception as error:  # the error comes from transformers' own fields, such as id2label
            said = f"config.json: transformers cannot read it ({type(error).__name__}: {str(error)[:200]!r})"
        folder = kwargs.get("name_or_path")  # transformers' Auto classes give the folder
        raise HyLoError(f"{folder}/{said}" if folder else said)

    @classmethod
    def from_architecture(cls, arch: Architecture, **kwargs) -> "HyLoConfig":
        """Return the config of a hybrid. Token ids come from ``arch.extra`` where they are in it."""
        if not all(kind in HYBRID for kind in arch.plan) or arch.geometry is None:
            raise HyLoError("only hybrids have a HyLoConfig: this architecture still has attention layers")
        values = {name: getattr(arch, name) for name in _SHARED}
        values |= {field: getattr(arch, name) for field, name in _RENAMED.items()}
        for entry in described(arch.plan):
            values |= geometry_to_config(entry, entry.dimensions(arch.geometry))
        values |= {name: arch.extra[name] for name in _TOKENS if name in arch.extra}
        values |= {"mixers": list(arch.plan), "linear_type": arch.linear_kind, "architecture_extra": arch.extra}
        return cls(**{**values, "architectures": ["HyLoForCausalLM"], **kwargs})

    def geometry(self) -> Geometry:
        """Return the dimensions of the mixers."""
        return Geometry(**{entry.name: config_to_geometry(entry, self) for entry in described(self.mixers)})

    def to_architecture(self) -> Architecture:
        """Return the architecture, which a Megatron checkpoint has as ``hylo.json``."""
        values = {name: getattr(self, name) for name in _SHARED}
        values |= {name: getattr(self, field) for field, name in _RENAMED.items()}
        values["rope_parameters"] = dict(self.rope_parameters)
        plan, extra = tuple(self.mixers), dict(self.architecture_extra)
        return Architecture(**values, plan=plan, geometry=self.geometry(), extra=extra)

    def save_pretrained(self, save_directory, **kwargs) -> None:
        """Write ``config.json`` and the code that it names for processes that do not know ``model_type: hylo``."""
        code_beside.choose(self)
        super().save_pretrained(save_directory, **kwargs)
        code_beside.write(self, Path(save_directory))

    @classmethod
    def register_for_auto_class(cls, auto_class="AutoConfig") -> None:
        """Do nothing: ``save_pretrained`` writes the code, where transformers would copy this module alone."""


def _mixers(values: dict) -> list[str]:
    """Return the mixer of each layer. Raises ``HyLoError`` if ``num_hidden_layers`` differs from their number."""
    layers = values["num_hidden_layers"]
    mixers = list(values["mixers"] or [LINEAR[0] if i % 4 else CACHED[0] for i in range(layers or 4)])
    if layers not in (None, len(mixers)):
        raise HyLoError(f"config.json: num_hidden_layers is {layers}, mixers has {len(mixers)} entries")
    return mixers


def _linear_kind(mixers: list[str]) -> str | None:
    """Return the model's linear mixer, or None. Raises ``HyLoError`` if it has several kinds."""
    kinds = [name for name in LINEAR if name in mixers]
    if len(kinds) > 1:
        both = " and ".join(kinds)
        raise HyLoError(f"config.json: mixers has both {both} layers; use one linear kind in a model")
    return kinds[0] if kinds else None
