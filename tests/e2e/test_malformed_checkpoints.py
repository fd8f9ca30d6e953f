"""Malformed checkpoints: metadata, data files and trackers are read right or refused in one line."""

import pickle
import shutil

import pytest
from helpers import mutations, tiny
from helpers.malformed import ARCH
from helpers.mutations import FEW, refused_or_equal
from hypothesis import given
from hypothesis import strategies as st

from hylo_megatron.checkpoint import iterations
from hylo_megatron.checkpoint.folder import CheckpointReader, write_checkpoint
from hylo_megatron.convert import megatron_to_hf
from hylo_megatron.convert.hf_to_megatron import megatron_tensors
from hylo_megatron.errors import HyLoError


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("malformed") / "checkpoint"
    tiny.write_hybrid(folder, ARCH)
    return folder


def tensors(folder) -> dict:
    reader = CheckpointReader(folder)
    return {key: reader[key] for key in list(reader.entries)[:4]}


def same_tensors(got, good) -> bool:
    return got.keys() == good.keys() and all(bool((got[key] == good[key]).all()) for key in good)


def test_metadata_pickle(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    path, good = folder / "release" / ".metadata", tensors(checkpoint)

    @FEW
    @given(mutations.files(path.read_bytes()))
    def run(data):
        path.write_bytes(data)
        refused_or_equal(lambda: tensors(folder), good, lambda got, _: True)

    run()


EDITS = {
    "a dictionary": lambda m: {"state_dict_metadata": {}},
    "no tensors": lambda m: m.__dict__.pop("state_dict_metadata"),
    "a list of tensors": lambda m: setattr(m, "state_dict_metadata", [1]),
    "a path outside": lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", "../x.distcp"),
    "a negative place": lambda m: setattr(next(iter(m.storage_data.values())), "offset", -8),
    "a place beyond the end": lambda m: setattr(next(iter(m.storage_data.values())), "length", 1 << 40),
    "a part left out": lambda m: m.state_dict_metadata["embedding.word_embeddings.weight"].chunks.clear(),
    "a place left out": lambda m: m.storage_data.pop(next(iter(m.storage_data))),
    "another file": lambda m: setattr(next(iter(m.storage_data.values())), "relative_path", "none.distcp"),
}


@pytest.mark.parametrize("name", EDITS)
def test_metadata_that_says_nonsense(name, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    path = folder / "release" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    replaced = EDITS[name](metadata)
    path.write_bytes(pickle.dumps(replaced if isinstance(replaced, dict) else metadata))
    with pytest.raises(HyLoError, match="release"):
        tensors(folder)


def test_data_files(checkpoint, tmp_path):
    """Heads of records and ends of files; a flipped bit inside a tensor is that tensor's, torch keeps no sums."""
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    path, good = folder / "release" / "__0_0.distcp", tensors(checkpoint)

    @FEW
    @given(st.integers(0, path.stat().st_size - 1))
    def run(size):
        path.write_bytes((checkpoint / "release" / "__0_0.distcp").read_bytes()[:size])
        refused_or_equal(lambda: tensors(folder), good, same_tensors)

    run()


@pytest.mark.parametrize("value", ["nan", "inf", "-inf"])
def test_weights_that_are_no_numbers(value, tmp_path):
    name = "model.layers.1.mlp.down_proj.weight"
    source = tiny.RandomWeights(ARCH)
    source.state[name][3, 4] = float(value)
    write_checkpoint(tmp_path / "checkpoint", ARCH, megatron_tensors(ARCH, source), lambda hf: hf.mkdir())
    with pytest.raises(HyLoError, match="release: tensor decoder.layers.3.mlp.linear_fc2.weight holds NaN or Inf"):
        megatron_to_hf.main.__wrapped__(["--ckpt", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out")])
    assert not (tmp_path / "out").exists()
    argv = ["--ckpt", str(tmp_path / "checkpoint"), "--out", str(tmp_path / "out"), "--allow-nan"]
    megatron_to_hf.main(argv)
    tiny.same_bits(tiny.weights(tmp_path / "out"), source.state)


TRACKERS = ["", "release", "7", "0007", "9" * 5000, "７", "-1", "1e3", "null", "\x00", "release\nrelease", "٣", "1_0"]


@pytest.mark.parametrize("word", TRACKERS, ids=lambda word: repr(word[:9]))
def test_tracker(word, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    (folder / iterations.TRACKER).write_text(word)
    refused_or_equal(lambda: iterations.latest(folder).name, "release")


def test_metadata_json(checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint, tmp_path / "copy")
    good = {"sharded_backend": "torch_dist", "sharded_backend_version": 1}

    @FEW
    @given(mutations.json_texts(good))
    def run(text):
        (folder / "release" / "metadata.json").write_bytes(text)
        refused_or_equal(lambda: iterations.latest(folder).name, "release")

    run()
