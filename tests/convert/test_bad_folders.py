"""Damaged folders and full disks: conversion ends in one line, and leaves nothing behind."""

import errno
import json
import re
import subprocess
import sys
from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from helpers import tiny
from helpers.conversion import HYBRIDS
from helpers.paths import ROOT

from hylo_megatron import files
from hylo_megatron.checkpoint import folder as checkpoint
from hylo_megatron.config import Architecture
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf
from hylo_megatron.errors import HyLoError


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    return tiny.save_model(tiny.teacher_model("mistral"), tmp_path_factory.mktemp("good") / "hf")


@pytest.fixture
def folder(good, tmp_path):
    """A copy of a good folder, to be spoilt."""
    target = tmp_path / "hf"
    target.mkdir()
    for path in good.iterdir():
        (target / path.name).write_bytes(path.read_bytes())
    return target


def refused(work, tmp_path, *words, out="out"):
    """``work()`` ends in one line that has all ``words``, and nothing of ``out`` is left."""
    with pytest.raises(HyLoError) as caught:
        work()
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(out)]


KEY = "model.layers.2.mlp.up_proj.weight"


def _change_weights(change):
    def spoil(folder):
        state = tiny.weights(folder)
        change(state)
        tiny.write_weights(folder, state)

    return spoil


def _config(**changes):
    return lambda folder: tiny.edit_json(folder / "config.json", **changes)


def _without(*fields):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        for field in fields:
            del config[field]
        (folder / "config.json").write_text(json.dumps(config))

    return spoil


def _truncate(name, size):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:size])


def _pickle_only(folder):
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")


def _sharded(spoil):
    def work(folder):
        state = tiny.weights(folder)
        (folder / "model.safetensors").unlink()
        tiny.write_weights(folder, state, shards=2)
        spoil(folder)

    return work


SHARD = "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def _index_names_the_wrong_shard(folder):
    index = json.loads((folder / INDEX).read_text())
    here = index["weight_map"][KEY]
    index["weight_map"][KEY] = next(name for name in index["weight_map"].values() if name != here)
    (folder / INDEX).write_text(json.dumps(index))


BAD = {
    "missing tensor": (_change_weights(lambda s: s.pop(KEY)), [KEY, "missing", "[96, 64]"]),
    "wrong shape": (
        _change_weights(lambda s: s.update({KEY: s[KEY][1:].clone()})),
        ["model.safetensors", KEY, "[95, 64]", "[96, 64]"],
    ),
    "unexpected tensor": (_change_weights(lambda s: s.update(odd=torch.ones(1))), ["unexpected tensor odd"]),
    "integer tensor": (_change_weights(lambda s: s.update({KEY: s[KEY].to(torch.int8)})), [KEY, "I8"]),
    "truncated file": (_truncate("model.safetensors", 20_000), ["model.safetensors", "truncated or damaged"]),
    "truncated header": (_truncate("model.safetensors", 20), ["model.safetensors", "truncated or damaged"]),
    "truncated shard": (_sharded(_truncate(SHARD, 20_000)), [SHARD, "truncated or damaged"]),
    "missing shard": (_sharded(lambda f: (f / SHARD).unlink()), [SHARD, "not found"]),
    "wrong shard": (_sharded(_index_names_the_wrong_shard), ["model-0000", KEY, INDEX]),
    "index without a map": (_sharded(lambda f: (f / INDEX).write_text("{}")), [INDEX, "weight_map"]),
    "pickle only": (_pickle_only, ["pytorch_model.bin", "pickle"]),
    "no config": (lambda folder: (folder / "config.json").unlink(), ["config.json not found"]),
    "broken config": (_truncate("config.json", 50), ["config.json", "not valid JSON"]),
    "config lacks a field": (_without("rms_norm_eps"), ["config.json", "rms_norm_eps", "missing"]),
    "unknown architecture": (_config(model_type="mamba"), ["config.json", "'mamba'", "llama, mistral, qwen2, qwen3"]),
    "sliding window": (_config(sliding_window=64), ["config.json", "sliding_window 64"]),
    "quantized": (_config(quantization_config={"bits": 4}), ["config.json", "quantization_config"]),
    "attention bias": (_config(attention_bias=True), ["config.json", "attention_bias"]),
    "other activation": (_config(hidden_act="gelu"), ["config.json", "hidden_act", "gelu"]),
    "large tokenizer": (lambda f: tiny.write_tokenizer(f, 301), ["tokenizer.json", "300", "vocab_size is 300"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(case, folder, tmp_path):
    spoil, words = BAD[case]
    spoil(folder)
    refused(lambda: hf_to_megatron.convert(folder, tmp_path / "out"), tmp_path, *words)


def test_what_is_only_a_long_enough_window_is_taken(folder, tmp_path):
    tiny.edit_json(folder / "config.json", sliding_window=256)
    hf_to_megatron.convert(folder, tmp_path / "out")


@pytest.mark.parametrize("work", [hf_to_megatron.convert, megatron_to_hf.convert])
def test_an_output_that_is_not_empty_stays_as_it_is(work, good, tmp_path):
    hf_to_megatron.convert(good, tmp_path / "ckpt")
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes").write_text("mine")
    source = good if work is hf_to_megatron.convert else tmp_path / "ckpt"
    with pytest.raises(HyLoError, match="out exists and is not empty"):
        work(source, out)
    assert [p.name for p in out.iterdir()] == ["notes"]
    (out / "notes").unlink()
    work(source, out)  # an empty folder is fine
    assert (out / "hylo.json").exists() or (out / "config.json").exists()


@pytest.mark.parametrize("work", [hf_to_megatron.convert, megatron_to_hf.convert])
def test_a_folder_that_another_process_writes_is_left_to_it(work, good, tmp_path, monkeypatch):
    hf_to_megatron.convert(good, tmp_path / "ckpt")
    source, out, tried = good if work is hf_to_megatron.convert else tmp_path / "ckpt", tmp_path / "out", []
    module, copy = sys.modules[work.__module__], sys.modules[work.__module__].copy_companions
    monkeypatch.setattr(files, "PATIENCE", 0)

    def copy_while_another_runs(*args, **options):
        if not tried:
            tried.append(None)
            with pytest.raises(HyLoError, match="out: another process is writing it; wait for its end"):
                work(source, out)
        return copy(*args, **options)

    monkeypatch.setattr(module, "copy_companions", copy_while_another_runs)
    work(source, out)
    assert tried and out.is_dir()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "out"]


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device", "out")


@pytest.mark.parametrize("where", ["tensors", "companions", "description"])
def test_a_full_disk_during_import(where, good, tmp_path, monkeypatch, capsys):
    target = {
        "tensors": (checkpoint._StreamingPlanner, "resolve_data"),
        "companions": (hf_to_megatron, "copy_companions"),
        "description": (Architecture, "save"),
    }[where]
    monkeypatch.setattr(*target, no_space)
    with pytest.raises(SystemExit) as caught:
        hf_to_megatron.main(["--hf", str(good), "--out", str(tmp_path / "out")])
    assert caught.value.code == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert re.match(r"error: .*out: no space left.*: it needs .*iB, .* is free on its disk", message)
    assert not list(tmp_path.iterdir())


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, 40_000))
from hylo_megatron.convert import {module}
{module}.main({argv})
"""


@pytest.mark.parametrize("module", ["hf_to_megatron", "megatron_to_hf"])
def test_a_file_that_may_not_grow_ends_in_one_line(module, good, tmp_path):
    """A limit on file sizes fails in the writers themselves, as a full disk does."""
    source = good
    if module == "megatron_to_hf":
        source = tmp_path / "ckpt"
        hf_to_megatron.convert(good, source)
    argv = ["--hf" if module == "hf_to_megatron" else "--ckpt", str(source), "--out", str(tmp_path / "out")]
    code = LIMITED.format(module=module, argv=argv)
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.strip().splitlines()[-1].startswith("error: ")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]


def test_the_tool_prints_one_line_and_exits_with_2(folder, tmp_path):
    _truncate("model.safetensors", 20_000)(folder)
    argv = [sys.executable, "tools/convert_hf_to_megatron.py", "--hf", str(folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1, done.stderr
    assert str(folder / "model.safetensors") in done.stderr
    assert not (tmp_path / "out").exists()


class TestBadCheckpoint:
    def export(self, tmp_path):
        return lambda: megatron_to_hf.convert(tmp_path / "ckpt", tmp_path / "out")

    def test_not_a_checkpoint(self, tmp_path):
        (tmp_path / "ckpt").mkdir()
        refused(self.export(tmp_path), tmp_path, "hylo.json not found")

    def test_no_tracker(self, tmp_path):
        tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS["gdn"])
        (tmp_path / "ckpt" / checkpoint.TRACKER).unlink()
        refused(self.export(tmp_path), tmp_path, checkpoint.TRACKER, "not found")

    def test_an_iteration_that_is_not_there(self, tmp_path):
        tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS["gdn"])
        (tmp_path / "ckpt" / checkpoint.TRACKER).write_text("40")
        refused(self.export(tmp_path), tmp_path, "iter_0000040", "incomplete")

    def test_a_description_of_another_model(self, tmp_path):
        tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS["gdn"])
        replace(HYBRIDS["gdn"], tie_word_embeddings=False).save(tmp_path / "ckpt")
        refused(self.export(tmp_path), tmp_path, "output_layer.weight", "missing")
        replace(HYBRIDS["gdn"], geometry=tiny.GEOMETRY_Q_LORA).save(tmp_path / "ckpt")
        refused(self.export(tmp_path), tmp_path, "release", "hylo.json")

    def test_a_data_file_that_is_cut_off(self, tmp_path):
        tiny.write_hybrid(tmp_path / "ckpt", HYBRIDS["gdn"])
        data = next((tmp_path / "ckpt" / "release").glob("*.distcp"))
        data.write_bytes(data.read_bytes()[: data.stat().st_size // 2])
        refused(self.export(tmp_path), tmp_path, "release", "it is truncated; copy the checkpoint again")
