"""Folders and files that are something else than their names say: one line tells what they are and what to do."""

import os
from pathlib import Path

import pytest

pytest.importorskip("transformers")
from helpers import tiny

from hylo_megatron.convert import hf_to_megatron
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.models import check_folder

POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:0000\nsize 12\n"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    work = tmp_path_factory.mktemp("good")
    folder = tiny.save_model(tiny.teacher_model("llama", num_hidden_layers=1), work / "hf")
    hf_to_megatron.convert(folder, work / "checkpoint")
    return folder


@pytest.fixture
def folder(good, tmp_path):
    """A hub's cache: a snapshot of links into the folder of blobs."""
    snapshot = tmp_path / "models--org--name" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    blobs = snapshot.parents[1] / "blobs"
    blobs.mkdir()
    for path in good.iterdir():
        (blobs / path.name).write_bytes(path.read_bytes())
        (snapshot / path.name).symlink_to(blobs / path.name)
    return snapshot


def _pointer(name):
    def spoil(folder):
        (folder / name).unlink()
        (folder / name).write_text(POINTER)

    return spoil


def _no_blob(name):
    return lambda folder: (folder / name).resolve().unlink()


def refusal(work) -> str:
    with pytest.raises(HyLoError) as caught:
        work()
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("spoil, words", [
    (_pointer("model.safetensors"), ["model.safetensors: a pointer of Git LFS", "git lfs pull"]),
    (_pointer("config.json"), ["config.json: a pointer of Git LFS"]),
    (_pointer("tokenizer.json"), ["tokenizer.json: a pointer of Git LFS"]),
    (_no_blob("model.safetensors"), ["model.safetensors is a link to", "missing", "download the file again"]),
    (_no_blob("config.json"), ["config.json: a link to", "missing"]),
])  # fmt: skip
def test_files_that_were_not_downloaded(folder, tmp_path, spoil, words):
    hf_to_megatron.convert(folder, tmp_path / "whole")
    spoil(folder)
    found = refusal(lambda: hf_to_megatron.convert(folder, tmp_path / "out"))
    assert not [word for word in words if word not in found], found


def test_a_missing_shard_that_is_a_link(folder, tmp_path):
    state = tiny.weights(folder)
    (folder / "model.safetensors").unlink()
    tiny.write_weights(folder, state, shards=2)
    shard = folder / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to(tmp_path / "nowhere")
    assert "00002.safetensors: a link to" in refusal(lambda: hf_to_megatron.convert(folder, tmp_path / "out"))


@pytest.mark.parametrize("spoil, word", [
    (_pointer("model.safetensors"), "a pointer of Git LFS"), (_pointer("config.json"), "a pointer of Git LFS"),
    (_no_blob("model.safetensors"), "a link to"),
    (lambda folder: (folder / "model.safetensors").unlink(), "no weights"),
])  # fmt: skip
def test_a_folder_to_be_evaluated(folder, spoil, word):
    assert check_folder(folder) == folder
    spoil(folder)
    assert word in refusal(lambda: check_folder(folder))


def test_a_model_that_needs_no_more_of_its_folder(folder, tmp_path):
    """Weights in another layout that were not downloaded, and snapshots of a training beside the model."""
    (folder / "consolidated.safetensors").write_text(POINTER)
    (folder / "snapshots" / "step-100").mkdir(parents=True)
    (folder / "snapshots" / "step-100" / "config.json").write_text("{}")
    assert check_folder(folder) == folder
    hf_to_megatron.convert(folder, tmp_path / "out")


@pytest.mark.parametrize(
    "tool", [lambda path, out: hf_to_megatron.convert(path, out), lambda path, _: check_folder(path)]
)
def test_other_folders_in_place_of_a_hugging_face_folder(good, folder, tmp_path, tool):
    cache, checkpoint = folder.parents[1], good.with_name("checkpoint")
    for path, words in (
        (cache, f"a hub's cache; give the folder of a snapshot in it, such as {folder}"),
        (checkpoint, "a Megatron checkpoint; expected a Hugging Face folder, which hylo export writes"),
        (checkpoint / "hf", "weights"),
        (Path("organisation/model"), "names of a hub are not looked up: download the model"),
    ):
        found = refusal(lambda path=path: tool(path, tmp_path / "out"))
        assert str(path) in found and words in found, found
    assert not os.path.exists(tmp_path / "out")
