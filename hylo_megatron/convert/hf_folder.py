"""Reads a Hugging Face folder: its config as an ``Architecture``, its safetensors one tensor at a time. No pickle."""

import json
import os
import shutil
from pathlib import Path

from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.config.architecture import MODEL_TYPES
from hylo_megatron.convert.shapes import hf_shapes
from hylo_megatron.errors import HyLoError
from hylo_megatron.platform import disk

TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "vocab.json",
    "merges.txt", "chat_template.jinja", "added_tokens.json", "generation_config.json",
)  # fmt: skip
_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def read_json(path: Path) -> dict:
    if not path.is_file():
        raise HyLoError(f"{path} not found: expected a Hugging Face folder with config.json and *.safetensors")
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise HyLoError(f"{path}: not valid JSON ({error}); download it again") from None


def _rope(config: dict, path: Path) -> dict:
    if config.get("rope_parameters"):
        return dict(config["rope_parameters"])
    scaling = dict(config.get("rope_scaling") or {})
    kind = scaling.pop("rope_type", None) or scaling.pop("type", None) or "default"
    scaling.pop("type", None)
    return {"rope_type": kind, "rope_theta": config.get("rope_theta", 10000.0), **scaling}


def _refuse_what_is_not_computed(config: dict, path: Path) -> None:
    unsupported = {
        "mlp_bias": "biases in the MLP",
        "quantization_config": "quantized weights (dequantize the checkpoint first)",
    }
    if config["model_type"] in ("llama", "mistral", "qwen3"):
        unsupported["attention_bias"] = "biases in this architecture's attention"
    for key, what in unsupported.items():
        if config.get(key):
            raise HyLoError(f"{path}: {key} is set, and {what} are not supported")
    if config.get("hidden_act", "silu") not in ("silu", "swish"):
        raise HyLoError(f"{path}: hidden_act {config['hidden_act']!r} is not supported; expected silu")
    window = config.get("sliding_window")
    if window and config.get("use_sliding_window", True) and window < config["max_position_embeddings"]:
        raise HyLoError(
            f"{path}: sliding_window {window} is shorter than max_position_embeddings; layers attend to everything"
            f" here, so set max_position_embeddings to {window} or less, or sliding_window to null"
        )


def read_architecture(folder: str | os.PathLike) -> Architecture:
    """``config.json`` of a Llama, Mistral, Qwen2 or Qwen3 model, or of an exported hybrid. Raises ``HyLoError``."""
    path = Path(folder) / "config.json"
    config = read_json(path)
    kind = config.get("model_type")
    if kind == "hylo":
        from hylo_megatron.hf import HyLoConfig

        return HyLoConfig.from_dict(config).to_architecture()
    if kind not in MODEL_TYPES:
        raise HyLoError(
            f"{path}: model_type {kind!r} is not supported; expected one of {', '.join(MODEL_TYPES)}, hylo"
        )
    try:
        heads = config["num_attention_heads"]
        arch = Architecture(
            model_type=kind,
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            intermediate_size=config["intermediate_size"],
            num_attention_heads=heads,
            num_key_value_heads=config.get("num_key_value_heads") or heads,
            head_dim=config.get("head_dim") or config["hidden_size"] // heads,
            rms_norm_eps=config["rms_norm_eps"],
            max_position_embeddings=config["max_position_embeddings"],
            rope_parameters=_rope(config, path),
            tie_word_embeddings=bool(config.get("tie_word_embeddings", False)),
            plan=("attention",) * config["num_hidden_layers"],
            attention_bias=kind == "qwen2",
            qk_norm=kind == "qwen3",
            extra={key: config[key] for key in _TOKEN_IDS if config.get(key) is not None},
        )
    except KeyError as error:
        raise HyLoError(f"{path}: {error} is missing; expected a complete {kind} config") from None
    _refuse_what_is_not_computed(config, path)
    return arch


class HFWeights:
    """The tensors of a folder, opened lazily and checked against an architecture before anything is read."""

    described_by, unmapped = "config.json", ""

    def __init__(self, folder: str | os.PathLike, arch: Architecture):
        self.folder, self.expected = Path(folder), hf_shapes(arch)
        self._files: dict[str, object] = {}
        self.where = self._index()
        if arch.tie_word_embeddings:
            self.where.pop("lm_head.weight", None)  # a copy of the embeddings that some exporters write
        self.where = {k: v for k, v in self.where.items() if not k.endswith("rotary_emb.inv_freq")}
        self._check()

    def _index(self) -> dict[str, str]:
        index = self.folder / "model.safetensors.index.json"
        if index.is_file():
            where = read_json(index).get("weight_map")
            if not isinstance(where, dict):
                raise HyLoError(f"{index}: weight_map is missing; download it again")
            return dict(where)
        if (self.folder / "model.safetensors").is_file():
            return {key: "model.safetensors" for key in self._open("model.safetensors").keys()}  # noqa: SIM118
        pickles = sorted(p.name for p in self.folder.glob("*.bin"))
        hint = f"; {pickles[0]} is a pickle, which is not read: save the model as safetensors" if pickles else ""
        raise HyLoError(f"{self.folder}: no model.safetensors and no model.safetensors.index.json{hint}")

    def _open(self, name: str):
        from safetensors import SafetensorError, safe_open

        if name not in self._files:
            path = self.folder / name
            if not path.is_file():
                raise HyLoError(f"{path} not found: the index names it; download the missing shard")
            try:
                self._files[name] = safe_open(path, framework="pt")
            except SafetensorError as error:
                raise HyLoError(f"{path}: truncated or damaged ({error}); download it again") from None
        return self._files[name]

    def _check(self) -> None:
        for key, shape in self.expected.items():
            if key not in self.where:
                raise HyLoError(f"{self.folder}: tensor {key} is missing; expected shape {list(shape)}")
            try:
                found = tuple(self._open(self.where[key]).get_slice(key).get_shape())
            except Exception as error:
                if isinstance(error, HyLoError):
                    raise
                raise HyLoError(f"{self.folder / self.where[key]}: tensor {key} cannot be read ({error})") from None
            if found != shape:
                raise HyLoError(
                    f"{self.folder / self.where[key]}: tensor {key} has shape {list(found)}, {self.described_by} asks"
                    f" for {list(shape)}; weights and config do not belong together"
                )
            self.dtype(key)
        if unused := sorted(set(self.where) - set(self.expected)):
            raise HyLoError(
                f"{self.folder}: unexpected tensor {unused[0]} ({len(unused)} in all) has no mapping{self.unmapped}"
            )

    def dtype(self, key: str):
        names = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}
        import torch

        name = self._open(self.where[key]).get_slice(key).get_dtype()
        if name not in names:
            raise HyLoError(
                f"{self.folder / self.where[key]}: tensor {key} has dtype {name}; expected one of {', '.join(names)}"
            )
        return getattr(torch, names[name])

    def __getitem__(self, key: str) -> Tensor:
        return self._open(self.where[key]).get_tensor(key)


def save_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """Writes a safetensors file. Raises ``HyLoError``, for a full disk too."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode  # save_file makes a file that only its owner can read
    try:
        save_file(tensors, path, metadata={"format": "pt"})
        path.chmod(mode)
    except SafetensorError as error:
        full = disk.explained(error, path, sum(tensor.nbytes for tensor in tensors.values()))
        raise full or HyLoError(f"cannot write {path} ({error}): choose another folder") from None


def check_tokenizer(folder: str | os.PathLike, vocab_size: int) -> None:
    """Raises ``HyLoError`` when the folder's tokenizer makes ids that the embedding does not have."""
    path = Path(folder) / "tokenizer.json"
    if not path.is_file():
        return
    vocab = read_json(path).get("model", {}).get("vocab", {})
    added = [token["id"] for token in read_json(path).get("added_tokens", [])]
    largest = max([*(vocab.values() if isinstance(vocab, dict) else [len(vocab) - 1]), *added, -1])
    if largest >= vocab_size:
        raise HyLoError(
            f"{path}: the tokenizer makes ids up to {largest}, the model's vocab_size is {vocab_size};"
            " they do not belong together"
        )


def copy_companions(source: Path, target: Path, with_config: bool = True) -> None:
    """Copies tokenizer and generation files (and the config) into ``target``."""
    target.mkdir(parents=True, exist_ok=True)
    for name in (*TOKENIZER_FILES, *(("config.json",) if with_config else ())):
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
