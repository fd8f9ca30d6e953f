"""Read ``hybrid_config.json`` of AMD's HyLo releases. What cannot be computed exactly is refused.

The meaning of the fields comes from ``Zebra-Llama/hybrid`` in github.com/AMD-AGI/AMD-Hybrid-Models (the code before
HyLo's) and from the releases' model cards. Every field must be known, because an unknown one may change the result.
"""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from hylo_megatron.config import Architecture, GDNGeometry, Mamba2Geometry, MLAGeometry, geometry_preset
from hylo_megatron.convert.hf_config import read_architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import read_json

FILE_NAME = "hybrid_config.json"
FLA_NORM_EPS = 1e-5  # GatedDeltaNet's default in flash-linear-attention

# Each field has the only value that can be mapped, and the meaning of any other value.
_FIXED = {
    "hidden_act": ("silu", "another activation in the MLPs"),
    "attention_bias": (False, "biases in MLA's projections"),
    "use_lora_layer_norm": (False, "norms between MLA's down- and up-projections"),
}
_FIXED_SSM = {
    "rmsnorm": (True, "no norm in front of the output projection"),
    "norm_before_gate": (False, "a norm before the gate instead of behind it"),
    "bias": (False, "biases in the projections"),
    "conv_bias": (True, "a convolution without bias"),
    "D_has_hdim": (False, "a skip weight per channel instead of per head"),
    "d_ssm": (None, "channels that bypass the state"),
    "dt_limit": ([0.0, math.inf], "clamped time steps"),
}
# optional fields that are arguments of flash-linear-attention
_FIXED_GDN = {
    "gdn_expand_v": (2, "another ratio of value to key dimension"),
    "gdn_num_v_heads": (None, "value heads of another number"),
    "gdn_use_gate": (True, "no output gate"),
    "gdn_use_short_conv": (True, "no convolution"),
    "gdn_conv_size": (4, "another width of the convolution"),
    "gdn_conv_bias": (False, "biases in the convolution"),
    "gdn_allow_neg_eigval": (False, "beta up to 2"),
}
# Fields without effect on the forward pass: dropout, rounding of ranks, initial values, speed, the first cache size.
_UNREAD = ("max_position_embeddings", "attention_dropout", "qkv_rank_divisor", "rope_type")
_UNREAD_SSM = ("expand", "headdim", "chunk_size", "use_mem_eff_path", "conv_init", "A_init_range", "dt_min", "dt_max",
               "dt_init_floor", "sequence_parallel")  # fmt: skip
_OF_MAMBA2 = ("d_inner", "d_xb", "ssm_cfg", "d_model")
_LINEAR_KINDS = {"gdn": "gdn", "mamba": "mamba2", "mamba2": "mamba2"}
_ROPE = {  # rope_scaling's fields by type: those it needs and those it may have
    "linear": ({"factor"}, set()),
    "yarn": ({"factor"}, {"original_max_position_embeddings", "beta_fast", "beta_slow"}),
    "llama3": ({"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}, set()),
}


@dataclass(frozen=True)
class Unsaid:
    """Settings that no file of a release has.

    ``interleaved``: rotary pairs are neighbours, as in the code before HyLo's, instead of half a head apart.
    ``ignored_fields``: unknown fields that change nothing.
    """

    max_position_embeddings: int | None = None
    interleaved: bool = True
    gdn_norm_eps: float = FLA_NORM_EPS
    ignored_fields: tuple[str, ...] = ()


@dataclass(frozen=True)
class Release:
    """The architecture that a release becomes, and how its tensors differ.

    ``mla_kv_heads``: heads that ``kv_b_proj`` writes; ``mamba_kv_heads``: heads of Mamba-2's x and B. Each serves
    ``num_attention_heads / kv_heads`` heads of ours. ``conv_repeated``: the convolution sees x and B repeated already.
    ``interleaved``: see ``Unsaid``.
    """

    arch: Architecture
    mla_kv_heads: int
    mamba_kv_heads: int
    conv_repeated: bool
    interleaved: bool


class _Fields:
    """A JSON object from which each read field is removed. ``ignored``: fields that may remain."""

    def __init__(self, path: Path, values: dict, ignored: tuple[str, ...], within: str = ""):
        self.path, self.values, self.ignored, self.within = path, dict(values), ignored, within

    def inner(self, name: str) -> "_Fields":
        values = self.values.pop(name, None)
        if not isinstance(values, dict):
            raise self.refuse(name, values, "an object; take the file from the release again")
        return _Fields(self.path, values, self.ignored, f"{name}.")

    def refuse(self, name: str, found, wanted: str) -> HyLoError:
        what = "missing" if found is None else repr(found)
        return HyLoError(f"{self.path}: {self.within}{name} is {what}, expected {wanted}")

    def size(self, name: str) -> int:
        return self._positive(name, self.values.pop(name, None), int, "a positive integer")

    def number(self, name: str, default: float | None = None) -> float:
        return float(self._positive(name, self.values.pop(name, default), int | float, "a positive number"))

    def _positive(self, name: str, found, kinds, wanted: str):
        if not isinstance(found, kinds) or isinstance(found, bool) or found <= 0:
            raise self.refuse(name, found, f"{wanted}; take the file from the release again")
        return found

    def fixed(self, table: dict) -> None:
        for name, (wanted, meaning) in table.items():
            found = self.values.pop(name, wanted)
            if found != wanted and (found or wanted):
                raise self.refuse(name, found, f"{wanted!r}: {meaning} cannot be mapped; convert a model without")

    def must_divide(self, whole: int, name: str, part: int) -> None:
        if whole % part:
            raise self.refuse(name, part, f"a divisor of {whole}; take the file from the release again")

    def drop(self, names: Iterable[str]) -> None:
        for name in names:
            self.values.pop(name, None)

    def finish(self) -> None:
        """Refuse fields that nobody asked for, unless they are null or empty: ``false`` may disable a default."""
        left = {self.within + name: found for name, found in self.values.items() if found not in (None, "", [], {})}
        if unknown := {name: found for name, found in left.items() if name not in self.ignored}:
            options = " ".join(f"--ignore-field {name}" for name in unknown)
            raise HyLoError(
                f"{self.path}: unknown fields {unknown}. They may change what the model computes; if you know that"
                f" they do not, give {options}"
            )


def trained_length(folder: Path, given: int | None) -> int:
    """Return the trained length in tokens; ``config.json`` has the base model's, which is another one."""
    if given:
        return given
    if match := re.search(r"(?:^|[-_])(\d+)[Kk](?:[-_]|$)", folder.absolute().name):
        return 1024 * int(match[1])
    raise HyLoError(
        f"{folder}: the folder's name does not say the trained length (as HyLo-Llama-4MLA12GDN-64K-SFT does) and"
        " config.json has the base model's; give --max-position-embeddings, 8192 for an 8K release, 65536 for 64K"
    )


def _rope(fields: _Fields) -> dict:
    """Return transformers' dictionary. Their YaRN scales cos and sin by 0.1 ln(factor) + 1, as transformers does."""
    theta = fields.number("rope_theta")
    if fields.values.get("rope_scaling") is None:
        return {"rope_type": "default", "rope_theta": theta}
    scaling = fields.inner("rope_scaling")
    kind = scaling.values.pop("rope_type", None)
    if kind not in _ROPE:
        raise scaling.refuse("rope_type", kind, f"one of {', '.join(_ROPE)}; others are not computed here")
    scaling.fixed({"mscale": (1, "another scale of cos and sin"), "mscale_all_dim": (0, "scaled attention scores")})
    needed, optional = _ROPE[kind]
    rope = {name: scaling.number(name) for name in sorted(needed | (optional & set(scaling.values)))}
    scaling.finish()
    if kind == "yarn":
        rope.setdefault("original_max_position_embeddings", 4096.0)  # their default
        if rope["factor"] == 1:  # Qwen at 8K: the base model's context
            return {"rope_type": "default", "rope_theta": theta}
    if "original_max_position_embeddings" in rope:
        rope["original_max_position_embeddings"] = int(rope["original_max_position_embeddings"])
    return {"rope_type": kind, "rope_theta": theta, **rope}


def _plan(fields: _Fields, layers: int, keys: Iterable[str]) -> tuple[str, ...]:
    mla = fields.values.pop("mla_layers", None)
    if not isinstance(mla, list) or [layer for layer in mla if layer not in range(layers)]:
        raise fields.refuse("mla_layers", mla, f"a list of numbers from 0 to {layers - 1}")
    stated = fields.values.pop("linear_type", None)
    if stated not in (None, *_LINEAR_KINDS):
        raise fields.refuse("linear_type", stated, f"one of {', '.join(_LINEAR_KINDS)}")
    linear = _LINEAR_KINDS[stated or ("mamba" if any(".mamba." in key for key in keys) else "gdn")]
    return tuple("mla" if layer in mla else linear for layer in range(layers))


def _mla(fields: _Fields, heads: int) -> tuple[MLAGeometry, int]:
    """Return the geometry, and how many heads ``kv_b_proj`` writes."""
    rank = None if fields.values.get("q_lora_rank", 0) is None else fields.size("q_lora_rank")
    sizes = [fields.size(n) for n in ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
    if sizes[2] % 2:
        raise fields.refuse("qk_rope_head_dim", sizes[2], "an even number: it counts halves of pairs")
    kv_heads = fields.size("num_key_value_heads")
    if fields.values.pop("use_full_kv_head", False):
        kv_heads = heads
    fields.must_divide(heads, "num_key_value_heads", kv_heads)
    latent, nope, rope, value = sizes
    geometry = MLAGeometry(
        kv_lora_rank=latent, qk_nope_head_dim=nope, qk_rope_head_dim=rope, v_head_dim=value, q_lora_rank=rank
    )
    return geometry, kv_heads


def _mamba2(fields: _Fields) -> tuple[Mamba2Geometry, int, bool]:
    """Return the geometry with x and B repeated, how many heads x and B have, and whether the convolution has all."""
    inner, xb = fields.size("d_inner"), fields.size("d_xb")
    ssm = fields.inner("ssm_cfg")
    heads, state = ssm.size("ngroups"), ssm.size("d_state")
    if heads * state != inner:
        raise fields.refuse("d_inner", inner, f"ssm_cfg's ngroups x d_state = {heads * state}")
    fields.must_divide(inner, "d_xb", xb)
    ssm.must_divide(xb, "d_state", state)
    width = ssm.size("d_conv") if "d_conv" in ssm.values else 4
    repeated = bool(ssm.values.pop("repeat_kv_before_conv", False))
    ssm.fixed(_FIXED_SSM)
    ssm.drop(_UNREAD_SSM)
    ssm.finish()
    geometry = Mamba2Geometry(num_heads=heads, head_dim=state, state_size=state, num_groups=heads, conv_kernel=width)
    return geometry, xb // state, repeated


def _check_base(fields: _Fields, base: Architecture) -> None:
    same = {"hidden_size": base.hidden_size, "intermediate_size": base.intermediate_size, "n_layer": base.num_layers,
            "num_attention_heads": base.num_attention_heads, "rms_norm_eps": base.rms_norm_eps}  # fmt: skip
    for name, wanted in same.items():
        found = fields.number(name, default=wanted if name == "rms_norm_eps" else None)
        if found != wanted:
            raise fields.refuse(name, found, f"{wanted} as in config.json; the two files do not belong together")


def described(folder: Path) -> Path:
    """Return the path of a release's ``hybrid_config.json``. Raises ``HyLoError`` where there is none."""
    path = folder / FILE_NAME
    if not path.is_file():
        raise HyLoError(
            f"{path} not found: expected the folder of a release of AMD's, such as HyLo-Qwen-14MLA14M2-8K-SFT"
        )
    return path


def read_release(folder: Path, keys: Iterable[str], unsaid: Unsaid) -> Release:
    """Read ``config.json``, which is the base model's, and ``hybrid_config.json``. ``keys``: names of the tensors."""
    path = described(folder)
    base, fields = read_architecture(folder), _Fields(path, read_json(path), unsaid.ignored_fields)
    _check_base(fields, base)
    fields.fixed(_FIXED)
    plan = _plan(fields, base.num_layers, keys)
    mla, kv_heads = _mla(fields, base.num_attention_heads)
    geometry = geometry_preset("native", base.hidden_size, base.num_attention_heads, base.head_dim)
    geometry, xb_heads, conv_repeated = replace(geometry, mla=mla), 1, False
    if "mamba2" in plan:
        fields.fixed({"d_model": (base.hidden_size, "a width of its own")})
        mamba2, xb_heads, conv_repeated = _mamba2(fields)
        geometry = replace(geometry, mamba2=mamba2)
    elif "gdn" in plan:
        fields.fixed(_FIXED_GDN)
        heads, dim = fields.size("gdn_num_heads"), fields.size("gdn_head_dim")
        eps = None if unsaid.gdn_norm_eps == base.rms_norm_eps else unsaid.gdn_norm_eps
        gdn = GDNGeometry(
            num_key_heads=heads, num_value_heads=heads, key_head_dim=dim, value_head_dim=2 * dim, norm_eps=eps
        )
        geometry = replace(geometry, gdn=gdn)
    rope = _rope(fields)
    fields.drop((*_UNREAD, *_OF_MAMBA2))
    if "gdn" not in plan:
        fields.drop([name for name in fields.values if name.startswith("gdn_")])
    fields.finish()
    arch = replace(
        base, plan=plan, geometry=geometry, mla_qk_norm=base.qk_norm, rope_parameters=rope,
        max_position_embeddings=trained_length(folder, unsaid.max_position_embeddings),
    )  # fmt: skip
    return Release(arch, kv_heads, xb_heads, conv_repeated, unsaid.interleaved)
