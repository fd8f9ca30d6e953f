"""Load a Hugging Face folder for evaluation, and describe it as far as no forward pass is needed."""

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers import PreTrainedTokenizerBase as Tokenizer

from hylo_megatron.convert.hf_config import misplaced
from hylo_megatron.convert.tokenizer_files import check_rows, identity_of, open_tokenizer
from hylo_megatron.errors import HyLoError, first_line
from hylo_megatron.files import not_downloaded
from hylo_megatron.hf import register
from hylo_megatron.json_file import read_json

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# In this order, as transformers reads them. Files beside them, such as consolidated.safetensors, may be missing.
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors")
COMPLETE = "full_attention"  # transformers' name; the caches of other layers do not grow beyond a size
SLIDING = "sliding_attention"
LOCAL = {"local_files_only": True, "trust_remote_code": False}
OTHER_HEADS = ("final_logit_softcapping", "logits_scaling", "logit_scale")
CPU_BATCH_TOKENS = 4096
# GPU memory per hidden value of a token: about ten times what cache and activations take in bf16, so that
# training may run on the same GPU. Large batches pay off: a decoding step takes as long for one row as for many.
CUDA_BATCH_BYTES = 1024
ONE_PASS = 32_768  # tokens of a prompt that one forward pass reads without a mask
MASK_PAIRS = 1 << 30  # largest mask of a chunk behind cached tokens, chunk x prompt; a pair takes 3 bytes


@dataclass(frozen=True)
class Loaded:
    name: str
    model: PreTrainedModel
    tokenizer: Tokenizer
    fingerprint: str  # equal for tokenizers that give the same ids


def resolve_device(device: str) -> torch.device:
    """Return the device; ``auto`` is CUDA if there is one, otherwise the CPU."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError) as error:
        raise HyLoError(
            f"--device {device}: cannot be used ({first_line(error)}); expected auto, cpu or cuda"
        ) from error
    return found


def resolve_dtype(dtype: str, device: torch.device) -> torch.dtype:
    """Return the dtype; ``auto`` is bfloat16 on CUDA and float32 on the CPU."""
    if dtype == "auto":
        dtype = "bfloat16" if device.type == "cuda" else "float32"
    if dtype not in DTYPES:
        raise HyLoError(f"--dtype {dtype}: expected auto, {' or '.join(DTYPES)}")
    return DTYPES[dtype]


def rows_per_batch(model: PreTrainedModel, length: int, batch_size: int | None) -> int:
    """Return how many sequences of ``length`` tokens run at once: ``batch_size``, or what suits the device."""
    tokens = CPU_BATCH_TOKENS
    if model.device.type == "cuda":
        memory = torch.cuda.get_device_properties(model.device).total_memory
        tokens = memory // (CUDA_BATCH_BYTES * model.config.hidden_size)
    return batch_size or max(1, tokens // length)


def prefill_chunk(length: int, chosen: int | None) -> int:
    """Return how many of ``length`` tokens one forward pass reads: ``chosen``, or what keeps the mask small."""
    if chosen or length <= ONE_PASS:
        return chosen or ONE_PASS
    return 1 << max(1, MASK_PAIRS // length).bit_length() - 1  # a power of two, for which kernels exist already


def check_folder(folder: str | Path) -> Path:
    """Return the folder as a path. The check is cheap, so a typing error shows before anything is loaded."""
    folder = Path(folder)
    if reason := misplaced(folder):
        raise HyLoError(f"{folder}: {reason}")
    if not folder.is_dir():
        raise HyLoError(f"model folder {folder} not found: expected a Hugging Face folder (config.json, weights)")
    if not (folder / "config.json").is_file():
        raise HyLoError(f"{folder} has no config.json: expected a Hugging Face folder (export a checkpoint first)")
    read_json(folder / "config.json")
    weights = next(filter(None, (sorted(folder.glob(pattern)) for pattern in WEIGHTS)), ())
    if not weights:
        raise HyLoError(
            f"{folder} has no weights: expected {' or '.join(WEIGHTS[:2])} beside config.json; download it again"
        )
    for path in weights:
        if reason := not_downloaded(path):
            raise HyLoError(f"{path}: {reason}")
        _check_header(path)
    return folder


def _check_header(path: Path) -> None:
    """Refuse a safetensors file that is cut off, without reading a tensor."""
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt"):
                pass
        except SafetensorError as error:
            raise HyLoError(f"{path}: truncated or damaged ({first_line(error)}); download it again") from None


def read_config(folder: Path, yarn: float | None = None) -> PreTrainedConfig:
    """Return the configuration of a model that can be loaded. ``yarn``: see ``with_yarn``. Raises ``HyLoError``."""
    register()
    try:
        config = AutoConfig.from_pretrained(folder, **LOCAL)
    except HyLoError:
        raise
    except Exception as error:  # transformers may raise anything for a malformed file
        raise HyLoError(f"{folder}: its config.json cannot be read ({first_line(error)})") from error
    if type(config) not in AutoModelForCausalLM._model_mapping:
        raise HyLoError(f"{folder}: model_type {config.model_type!r} is no causal language model that is known here")
    if getattr(config, "num_attention_heads", None) is None:
        raise HyLoError(
            f"{folder}: model_type {config.model_type!r} has no attention, and its states are not read here; expected"
            " a Transformer, or a hybrid of hylo export"
        )
    return with_yarn(config, yarn, folder) if yarn else config


def most_positions(config: PreTrainedConfig) -> int | None:
    """Return how many positions a model has, or None: rotary embeddings have any number, as have hybrids."""
    return None if getattr(config, "rope_parameters", None) else getattr(config, "max_position_embeddings", None)


def check_logits(config: PreTrainedConfig) -> None:
    """Raise ``HyLoError`` for a model that changes the logits behind its head, which losses do not cover."""
    if any(getattr(config, name, None) not in (None, 1.0) for name in OTHER_HEADS):
        raise HyLoError(f"{config.model_type} scales or caps its logits, which this evaluation does not cover")


def with_yarn(config, factor: float, folder: str | Path) -> PreTrainedConfig:
    """Return a configuration with YaRN, which scales the rotary frequencies for ``factor`` times the window."""
    rope = getattr(config, "rope_parameters", None) or {}
    if config.model_type == "hylo" or rope.get("rope_type") != "default":
        raise HyLoError(
            f"{folder}/config.json: rope_type is {rope.get('rope_type')!r} and model_type {config.model_type!r}; YaRN "
            "needs a base model with rope_type 'default': leave out --teacher-yarn"
        )
    window = config.max_position_embeddings
    config.rope_parameters = {
        **rope, "rope_type": "yarn", "factor": factor, "original_max_position_embeddings": window
    }  # fmt: skip
    config.max_position_embeddings = int(window * factor)
    return config


def load(folder: str | Path, device: torch.device, dtype: torch.dtype, yarn: float | None = None) -> Loaded:
    """Read model and tokenizer from the disk only. Code in the folder is never run. ``yarn``: see ``with_yarn``."""
    folder = check_folder(folder)
    options = {**LOCAL, "config": read_config(folder, yarn)}
    tokenizer = open_tokenizer(folder)
    try:
        model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, output_loading_info=True, **options)
    except HyLoError:
        raise
    except Exception as error:  # transformers may raise anything for a malformed file
        raise HyLoError(f"{folder}: its model cannot be loaded ({first_line(error)})") from error
    absent = sorted(map(str, info["missing_keys"])) + sorted(map(str, info["mismatched_keys"]))
    if absent:
        raise HyLoError(
            f"{folder}: {len(absent)} weights are missing or not of the shape in config.json, e.g. {absent[0]}"
        )
    identity = identity_of(tokenizer)
    check_rows(identity, model.get_input_embeddings().weight.shape[0], folder)
    # A clean configuration: a sampling temperature or repetition penalty of the folder would change greedy decoding.
    model.generation_config = GenerationConfig(
        eos_token_id=model.generation_config.eos_token_id, bos_token_id=model.generation_config.bos_token_id
    )
    return Loaded(folder.resolve().name, model.to(device).eval(), tokenizer, identity.fingerprint)


def layer_plan(config) -> list[str]:
    """Return the name of every layer's mixer; other models' layers may have a name of transformers."""
    if config.model_type == "hylo":
        return list(config.mixers)
    every = SLIDING if getattr(config, "sliding_window", None) else COMPLETE  # as transformers' caches
    types = getattr(config, "layer_types", None) or [every] * config.num_hidden_layers
    return ["attention" if kind == COMPLETE else kind for kind in types]


def kv_bytes_per_token(config, bytes_per_value: int = 2, length: int | None = None) -> int:
    """Return the bytes that each further token adds to the cache, by default in bf16; fixed states add none.

    A layer with a sliding window that no text of ``length`` (default: the model's longest) fills grows as all others.
    """
    if config.model_type == "hylo":
        return config.to_architecture().kv_bytes_per_token(bytes_per_value)
    plan = layer_plan(config)
    growing = plan.count("attention") + (0 if _slides(config, length) else plan.count(SLIDING))
    return growing * _row_bytes(config, bytes_per_value)


def window_cache_bytes(config) -> int:
    """Return the bytes in bf16 that the windows of a request cache once they are full, whatever its length."""
    if config.model_type == "hylo":
        return config.to_architecture().window_bytes()
    if not _slides(config, None):
        return 0
    return layer_plan(config).count(SLIDING) * config.sliding_window * _row_bytes(config, 2)


def _slides(config, length: int | None) -> bool:
    """Return whether a text of ``length`` tokens is longer than the sliding window of some layers."""
    window, most = getattr(config, "sliding_window", None), getattr(config, "max_position_embeddings", None)
    return bool(window) and window < (length or most or math.inf)


def _row_bytes(config, bytes_per_value: int) -> int:
    """Return the bytes of the keys and values of one token in one layer of attention."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return bytes_per_value * 2 * kv_heads * head_dim


def describe(loaded: Loaded) -> dict:
    """Return size, layer plan and cache size of a model for the report."""
    model, config = loaded.model, loaded.model.config
    windows = window_cache_bytes(config)
    return {
        "name": loaded.name,
        "model_type": config.model_type,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "vocabulary": len(loaded.tokenizer),
        "tokenizer": loaded.fingerprint,
        "plan": layer_plan(config),
        "kv_cache_bytes_per_token": kv_bytes_per_token(config),
        **({"window_cache_bytes": windows} if windows else {}),
    }
