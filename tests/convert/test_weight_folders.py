"""Folders of weights: what is converted has transformers' logits, everything else is refused in one line."""

import json
import math
import weakref
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers")
from helpers import tiny
from helpers import weight_folders as folders
from helpers.weight_folders import SAME, convert

from hylo_megatron.checkpoint import folder as checkpoint
from hylo_megatron.convert import hf_to_megatron, self_check
from hylo_megatron.convert.hf_config import read_architecture
from hylo_megatron.convert.hf_folder import HFWeights
from hylo_megatron.errors import HyLoError


def refused(source: Path, out: Path, *words: str) -> None:
    """Conversion ends in one line with all ``words``, and nothing of ``out`` is left."""
    with pytest.raises(HyLoError) as caught:
        convert(source, out)
    message = str(caught.value)
    assert "\n" not in message and not [word for word in words if word not in message], message
    assert not list(out.parent.glob(out.name + "*"))


# ---- which files count ----


BASE = {
    "model_type": "llama", "vocab_size": 40, "hidden_size": 32, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5, "max_position_embeddings": 64,
    "rope_theta": 1e4, "tie_word_embeddings": True,
}  # fmt: skip
UP, EMBEDDING, HEAD = "model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "lm_head.weight"
INDEX, FIRST, SECOND = (
    "model.safetensors.index.json",
    "model-00001-of-00002.safetensors",
    "model-00002-of-00002.safetensors",
)


@pytest.fixture
def folder(tmp_path):
    return folders.write_folder(tmp_path / "hf", BASE)


@pytest.fixture
def sharded(tmp_path):
    return folders.write_folder(tmp_path / "hf", BASE, shards=2)


def rewrite(folder: Path, change, **config) -> None:
    """``change(state)`` of the weights, and changes of the config."""
    state = tiny.weights(folder)
    tiny.write_weights(folder, change(state) or state)
    tiny.edit_json(folder / "config.json", **config)


def same_as_transformers(source: Path, out: Path) -> None:
    convert(source, out)
    assert folders.difference(source, out) < SAME


DTYPES = (torch.float64, torch.bfloat16, torch.float16)


def without_prefix(state):
    return {key.removeprefix("model."): tensor for key, tensor in state.items()}


def with_double_prefix(state):
    """``model.lm_head`` beside the others: transformers drops the prefix where that gives a name it knows."""
    return state | {"model.lm_head.weight": state[EMBEDDING].clone() + 1}


@pytest.mark.parametrize("change, config", [
    (without_prefix, {}), (with_double_prefix, {"tie_word_embeddings": False}),
    (lambda s: s | {HEAD: s[EMBEDDING].clone()}, {}),
    (lambda s: s | {HEAD: s[EMBEDDING] + 1}, {"tie_word_embeddings": False}),
    (lambda s: {k: t.to(DTYPES[i % 3]) for i, (k, t) in enumerate(s.items())}, {}),
], ids=["saved from the inner model", "head with a prefix", "copied head", "untied head", "mixed dtypes"])  # fmt: skip
def test_names_and_dtypes_as_transformers_takes_them(folder, tmp_path, change, config):
    rewrite(folder, change, **config)
    same_as_transformers(folder, tmp_path / "ckpt")


def test_a_single_file_counts_before_an_index(sharded, tmp_path):
    state = {key: tensor * 1.5 for key, tensor in tiny.weights(sharded).items()}
    tiny.write_weights(sharded, state)
    same_as_transformers(sharded, tmp_path / "ckpt")
    assert set(HFWeights(sharded, read_architecture(sharded)).where.values()) == {"model.safetensors"}


def test_a_cache_of_links_is_read(sharded, tmp_path):
    """Snapshots of the Hugging Face cache are links to files outside the folder."""
    (tmp_path / "blobs").mkdir()
    for name in (FIRST, SECOND):
        (sharded / name).rename(tmp_path / "blobs" / name)
        (sharded / name).symlink_to(tmp_path / "blobs" / name)
    same_as_transformers(sharded, tmp_path / "ckpt")


def _moved(place: str):
    def change(folder):
        index = json.loads((folder / INDEX).read_text())
        index["weight_map"] = {k: place if v == SECOND else v for k, v in index["weight_map"].items()}
        (folder / INDEX).write_text(json.dumps(index))
        (folder.parent / SECOND).write_bytes((folder / SECOND).read_bytes())

    return change


def _unlisted(folder):
    index = json.loads((folder / INDEX).read_text())
    del index["weight_map"][UP]
    (folder / INDEX).write_text(json.dumps(index))


def _twice(folder):
    tiny.save_file(tiny.load_file(folder / FIRST) | {UP: torch.ones(24, 32)}, folder / FIRST)
    tiny.save_file(tiny.load_file(folder / SECOND) | {UP: torch.zeros(24, 32)}, folder / SECOND)


@pytest.mark.parametrize("change, words", [
    (_moved(f"../{SECOND}"), [INDEX, f"../{SECOND}", "file of the same folder"]),
    (_moved(f"/elsewhere/{SECOND}"), [INDEX, "file of the same folder"]),
    (_moved(f"..\\{SECOND}"), [INDEX, "file of the same folder"]),
    (_moved(".."), [INDEX, "file of the same folder"]), (_moved(5), [INDEX, "weight_map", "string"]),
    (_unlisted, ["model-0000", UP, "nowhere"]), (_twice, ["model-0000", UP, "model-0000"]),
    (lambda f: (f / INDEX).write_text("[]"), [INDEX]),
    (lambda f: (f / INDEX).write_text("{"), [INDEX, "not valid JSON"]),
], ids=["up", "absolute", "backslash", "dots", "number", "unlisted", "twice", "array", "half"])  # fmt: skip
def test_shards_that_do_not_fit_their_index_are_refused(sharded, tmp_path, change, words):
    change(sharded)
    refused(sharded, tmp_path / "out", *words)


def _renamed(state):
    return {f"_orig_mod.{key}": tensor for key, tensor in state.items()}


def _both_prefixes(state):
    return state | {EMBEDDING.removeprefix("model."): state[EMBEDDING].clone()}


@pytest.mark.parametrize("change, config, words", [
    (lambda s: s | {HEAD: s[EMBEDDING] + 1e-3}, {}, [HEAD, "differs", "tie_word_embeddings"]),
    (lambda s: s | {HEAD: s[EMBEDDING][1:].clone()}, {}, [HEAD, "differs"]),
    (lambda s: s, {"tie_word_embeddings": False}, [HEAD, "missing"]),
    (lambda s: {HEAD if k == EMBEDDING else k: t for k, t in s.items()}, {}, [EMBEDDING, "missing"]),
    (_both_prefixes, {}, [EMBEDDING, "embed_tokens.weight", "the same one"]),
    (_renamed, {}, ["missing", "_orig_mod.model.embed_tokens.weight", "prefix"]),
    (lambda s: s | {"model.layers.2.mlp.up_proj.weight": s[UP].clone()}, {}, ["model.layers.2.mlp", "unexpected"]),
    (lambda s: s | {UP: s[UP].to(torch.float8_e4m3fn)}, {}, [UP, "F8_E4M3", "quantised"]),
    (lambda s: s | {UP: torch.ones(24, 16, dtype=torch.uint8)}, {}, [UP, "U8", "quantised"]),
    (lambda s: s | {UP.replace("weight", "qweight"): s[UP].clone()}, {}, ["qweight", "quantised"]),
    (lambda s: s | {UP + "_scale_inv": torch.ones(1)}, {}, ["weight_scale_inv", "quantised"]),
    (lambda s: s | {UP + ".absmax": torch.ones(1)}, {}, ["absmax", "quantised"]),
    (lambda s: s, {"quantization_config": {"bits": 4}}, ["config.json", "quantization_config", "dequantise"]),
    (lambda s: s, {"compression_config": {"format": "x"}}, ["config.json", "compression_config", "dequantise"]),
    (lambda s: s | {UP: torch.full_like(s[UP], math.nan)}, {}, [UP, "NaN or Inf", "--allow-nan"]),
    (lambda s: s | {UP: torch.full_like(s[UP], -math.inf).bfloat16()}, {}, [UP, "NaN or Inf"]),
])  # fmt: skip
def test_weights_that_are_refused(folder, tmp_path, change, config, words):
    rewrite(folder, change, **config)
    refused(folder, tmp_path / "out", *words)


@pytest.mark.parametrize("name, content, words", [
    ("hf_quant_config.json", {"quantization": {"quant_algo": "NVFP4"}}, ["hf_quant_config.json", "NVFP4"]),
    ("quantize_config.json", {"bits": 4, "group_size": 128}, ["quantize_config.json", "dequantise"]),
    ("hf_quant_config.json", [], ["hf_quant_config.json"]),
    ("adapter_config.json", {"peft_type": "LORA"}, ["adapter_config.json", "merge"]),
])  # fmt: skip
def test_what_stands_beside_the_weights_counts(folder, tmp_path, name, content, words):
    rewrite(folder, lambda state: state | {UP: torch.ones(3, 5, dtype=torch.uint8)})  # a shape that fits nothing
    (folder / name).write_text(json.dumps(content))
    refused(folder, tmp_path / "out", *words)


@pytest.mark.parametrize("name, word", [
    ("m.gguf", "GGUF"), ("adapter_model.safetensors", "merge"), ("a.bin", "pickle"),
    ("weights.safetensors", "another name"), ("notes", "no model.safetensors"),
])  # fmt: skip
def test_a_folder_without_weights_says_what_it_has(folder, tmp_path, name, word):
    (folder / "model.safetensors").rename(folder / name)
    refused(folder, tmp_path / "out", word)


# ---- the self-check ----


def test_the_difference_is_printed(folder, tmp_path, capsys):
    hf_to_megatron.main(["--hf", str(folder), "--out", str(tmp_path / "out")])
    line = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("self-check"))
    assert 0 <= float(line.split(" by ")[1].split()[0]) < SAME
    hf_to_megatron.main(["--hf", str(folder), "--out", str(tmp_path / "again"), "--no-self-check"])
    assert "self-check" not in capsys.readouterr().out


def test_weights_that_are_not_finite_pass_with_the_switch(folder, tmp_path, capsys):
    rewrite(folder, lambda state: state | {UP: torch.full_like(state[UP], math.nan)})
    hf_to_megatron.main(["--hf", str(folder), "--out", str(tmp_path / "out"), "--allow-nan"])
    assert "not finite" in capsys.readouterr().out


def test_a_fault_of_the_converter_leaves_nothing(folder, tmp_path, monkeypatch):
    made = hf_to_megatron.megatron_tensors

    def faulty(arch, weights):
        tensors = made(arch, weights)
        key = "decoder.layers.3.mlp.linear_fc1.weight"  # the second layer's gate and up
        load = tensors[key].load
        tensors[key] = hf_to_megatron.LazyTensor(tensors[key].shape, tensors[key].dtype, lambda: load().flip(0))
        return tensors

    monkeypatch.setattr(hf_to_megatron, "megatron_tensors", faulty)
    refused(folder, tmp_path / "out", "self-check failed", "first in layer 1", "--no-self-check")
    convert(folder, tmp_path / "out", check=False)


def test_frequencies_unlike_transformers_are_refused_before_writing(folder, tmp_path, monkeypatch):
    rope = self_check.rope_frequencies
    monkeypatch.setattr(self_check, "rope_frequencies", lambda *args: (rope(*args)[0] * 1.001, 1.0))
    refused(folder, tmp_path / "out", "config.json", "other frequencies")


def test_the_self_check_holds_one_layer_at_a_time(tmp_path, monkeypatch):
    source = folders.write_folder(tmp_path / "hf", BASE | {"num_hidden_layers": 6})
    live, read = {"now": 0, "peak": 0}, HFWeights.__getitem__

    def counted(self, key):
        tensor = read(self, key)
        live["now"] += 1
        live["peak"] = max(live["peak"], live["now"])
        weakref.finalize(tensor.untyped_storage(), lambda: live.update(now=live["now"] - 1))
        return tensor

    monkeypatch.setattr(HFWeights, "__getitem__", counted)
    monkeypatch.setattr(checkpoint, "FILE_BYTES", 1)
    convert(source, tmp_path / "out")
    assert 9 <= live["peak"] <= 11, f"{live['peak']} tensors alive at once; a layer has 9, the end of the model two"
