"""Read ``config.json`` as transformers reads it, and refuse what we would compute differently.

transformers' configuration classes resolve the values.
"""

import os
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from typing_extensions import TypedDict

from hylo_megatron.config import Architecture
from hylo_megatron.config.architecture import FILE_NAME, MODEL_TYPES
from hylo_megatron.config.rope import checked_rope
from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import Object, Positive, Size, check, read_json

TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
_FOLDER = "expected a Hugging Face folder with config.json and *.safetensors; download it again"


class _Needed(TypedDict):
    """Required fields. For a missing one, transformers would use a default that belongs to another model."""

    vocab_size: Size
    hidden_size: Size
    intermediate_size: Size
    num_hidden_layers: Annotated[int, Field(ge=1, le=10_000)]
    num_attention_heads: Size
    rms_norm_eps: Positive
    max_position_embeddings: Size


class _Known(_Needed, total=False):
    num_key_value_heads: Size | None
    head_dim: Size | None
    tie_word_embeddings: bool
    attention_bias: bool | None
    mlp_bias: bool | None
    hidden_act: str
    rope_theta: Positive | None
    rope_scaling: Object | None
    rope_parameters: Object | None
    partial_rotary_factor: Positive | None
    original_max_position_embeddings: Size | None
    sliding_window: Size | None
    use_sliding_window: bool | None
    max_window_layers: int | None
    layer_types: list[str] | None
    bos_token_id: int | list[int] | None
    eos_token_id: int | list[int] | None
    pad_token_id: int | list[int] | None


# Each field has the values that change nothing and the meaning of any other value. transformers' Llama, Mistral and
# Qwen
# models read only some of these fields; models of other families or with remote code read the others.
_QUANTISED = "quantised weights: dequantise the model first"
_NOTHING = (None, False, 0, [], {})
_MULTIPLIER = (*_NOTHING, 1.0)
_MUST_BE = {
    "quantization_config": (_NOTHING, _QUANTISED),
    "compression_config": (_NOTHING, _QUANTISED),
    "mlp_bias": (_NOTHING, "biases in the MLP"),
    "hidden_act": (("silu", "swish"), "another activation; expected silu"),
    "partial_rotary_factor": ((None, 1.0), "heads that are rotated in part"),
    "per_layer_config": (_NOTHING, "layers that differ from each other"),
    "is_causal": ((None, True), "attention that is not causal"),
    "use_bidirectional_attention": (_NOTHING, "attention that is not causal"),
    "configuration_files": (_NOTHING, "configurations in other files"),
    "transformers_weights": ((None, "model.safetensors"), "weights in another file: rename it to model.safetensors"),
    "auto_map": (_NOTHING, "code that the folder brings; if transformers' own class computes the same, remove it"),
    **dict.fromkeys(("no_rope_layers", "no_rope_layer_interval"), (_NOTHING, "layers without a rotary embedding")),
    **dict.fromkeys(("num_experts", "num_local_experts"), (_NOTHING, "mixtures of experts")),
    **dict.fromkeys(("clip_qkv", "qk_layernorm", "use_qk_norm"), (_NOTHING, "changed queries and keys")),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping"), (_NOTHING, "capped logits")),
    **dict.fromkeys(
        ("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier", "attention_multiplier",
         "scale_emb", "scale_depth", "query_pre_attn_scalar", "attention_chunk_size"),
        (_MULTIPLIER, "a scale or a limit that is not computed"),
    ),
}  # fmt: skip


def _refuse_what_is_not_computed(raw: dict, path: Path) -> None:
    table = dict(_MUST_BE)
    if raw["model_type"] != "qwen2":  # Qwen2's queries, keys and values always have a bias
        table["attention_bias"] = (_NOTHING, "biases in this architecture's attention")
    for key, (harmless, what) in table.items():
        if key in raw and raw[key] not in harmless:
            value = f" is {raw[key]!r}" if isinstance(raw[key], (str, int, float)) else " is set"
            raise HyLoError(f"{path}: {key}{value}, which means {what}; that is not supported")


def _refuse_windows(raw: dict, config: Any, path: Path) -> None:
    kinds = set(raw.get("layer_types") or ()) | set(getattr(config, "layer_types", None) or ())
    if others := sorted(kinds - {"full_attention", "sliding_attention"}):
        raise HyLoError(f"{path}: layer_types has {others[0]!r}, which is not supported; expected full_attention")
    window = getattr(config, "sliding_window", None)
    sliding = "sliding_attention" in kinds or (config.model_type in ("llama", "mistral") and window is not None)
    if sliding and (window is None or window < config.max_position_embeddings):
        raise HyLoError(
            f"{path}: sliding_window {window} is shorter than max_position_embeddings; layers attend to everything"
            f" here, so set max_position_embeddings to {window or 'its length'} or less, or sliding_window to null"
            " (with every layer_types full_attention)"
        )


def transformers_config(path: Path, kind: str) -> Any:
    """Return transformers' config object for ``config.json``. Raises ``HyLoError`` with transformers' own reason."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(path.parent, trust_remote_code=False)
    except Exception as error:  # transformers' validators raise many kinds of exceptions
        reason = " ".join(str(error).split())[:300]
        raise HyLoError(
            f"{path}: transformers does not accept it ({type(error).__name__}: {reason}); compare it with the"
            " config.json that the model was published with"
        ) from None
    if config.model_type != kind:
        raise HyLoError(
            f"{path}: transformers takes this {kind} model for {config.model_type!r}, which is not supported; for a"
            " mistral model that attends to everything remove layer_types"
        )
    return config


def misplaced(folder: Path) -> str | None:
    """Return what a path is in place of a Hugging Face folder and what to do, or None if nothing is known."""
    if not folder.is_dir():
        is_name = len(folder.parts) == 2 and not folder.is_absolute() and not folder.parent.exists()
        return "no such folder; names of a hub are not looked up: download the model first" if is_name else None
    if (folder / "config.json").exists():
        return None
    if snapshots := sorted((folder / "snapshots").glob("*/config.json")):
        return f"a hub's cache; give the folder of a snapshot in it, such as {snapshots[0].parent}"
    if (folder / FILE_NAME).is_file():
        return "a Megatron checkpoint; expected a Hugging Face folder, which hylo export writes of it"
    return None


def read_config(folder: str | os.PathLike) -> tuple[dict, Path]:
    """Return ``config.json`` and its path. Raises ``HyLoError``, also if the folder has no model."""
    folder = Path(folder)
    if reason := misplaced(folder):
        raise HyLoError(f"{folder}: {reason}")
    if not folder.is_dir():
        raise HyLoError(f"{folder} is not a folder; {_FOLDER}")
    if (folder / "adapter_config.json").is_file():
        raise HyLoError(
            f"{folder / 'adapter_config.json'}: the folder holds an adapter; merge it into its base model first"
            " (PEFT's merge_and_unload) and give the folder of the merged model"
        )
    return read_json(folder / "config.json", Object, _FOLDER), folder / "config.json"


def _rope(parameters: dict, max_positions: int, path: Path) -> dict:
    return checked_rope(dict(parameters), max_positions, f"{path}: rotary embedding")


def read_architecture(folder: str | os.PathLike) -> Architecture:
    """Read ``config.json`` of a Llama, Mistral, Qwen2, Qwen3 or exported hybrid model. Raises ``HyLoError``."""
    raw, path = read_config(folder)
    kind = raw.get("model_type")
    if kind == "hylo":
        from hylo_megatron.hf import HyLoConfig

        arch = HyLoConfig.from_dict(raw).to_architecture()
        return replace(arch, rope_parameters=_rope(arch.rope_parameters, arch.max_position_embeddings, path))
    if kind not in MODEL_TYPES:
        raise HyLoError(
            f"{path}: model_type {kind!r} is not supported; expected one of {', '.join(MODEL_TYPES)}, hylo"
        )
    _refuse_what_is_not_computed(raw, path)
    if missing := [field for field in _Needed.__annotations__ if field not in raw]:
        raise HyLoError(f"{path}: {missing[0]} is missing; expected a complete {kind} config")
    check(raw, _Known, str(path), f"expected a complete {kind} config")
    config = transformers_config(path, kind)
    _refuse_windows(raw, config, path)
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    if heads % groups or head_dim % 2:
        raise HyLoError(
            f"{path}: {heads} attention heads with {groups} key-value heads of dimension {head_dim}; expected a"
            " multiple of the key-value heads and an even dimension"
        )
    return Architecture(
        model_type=kind, vocab_size=config.vocab_size, hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size, num_attention_heads=heads, num_key_value_heads=groups,
        head_dim=head_dim, rms_norm_eps=config.rms_norm_eps, max_position_embeddings=config.max_position_embeddings,
        rope_parameters=_rope(config.rope_parameters, config.max_position_embeddings, path),
        tie_word_embeddings=config.tie_word_embeddings, plan=("attention",) * config.num_hidden_layers,
        attention_bias=kind == "qwen2", qk_norm=kind == "qwen3",
        extra={key: raw[key] for key in TOKEN_IDS if raw.get(key) is not None},
    )  # fmt: skip
