"""Malformed token files, their summaries and marks: each is read right or refused in one line."""

import json
import pickle
import shutil
from pathlib import Path

import numpy as np
import pytest
from helpers import mutations, tiny
from helpers.mutations import FEW, refused_or_equal
from hypothesis import given

from hylo_megatron.data.token_files import Summary, check_token_files, read_answers, read_summary
from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import check


@pytest.fixture(scope="module")
def token_prefix(tmp_path_factory) -> Path:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    prefix = tmp_path_factory.mktemp("tokens") / "data"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.uint16)
    for length in (3, 1, 7, 5):
        builder.add_document(np.arange(length, dtype=np.uint16), [length])
    builder.finalize(f"{prefix}.idx")
    return prefix


def read_tokens(prefix) -> list:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    check_token_files(prefix)
    dataset = IndexedDataset(str(prefix))
    return [dataset[index].tolist() for index in range(len(dataset))]


def test_token_index(token_prefix, tmp_path):
    good, data = read_tokens(token_prefix), Path(f"{token_prefix}.idx").read_bytes()
    shutil.copy(f"{token_prefix}.bin", tmp_path / "copy.bin")

    @FEW
    @given(mutations.files(data))
    def run(changed):
        (tmp_path / "copy.idx").write_bytes(changed)
        # two bytes for a token may be read as int16 as well; these are small
        refused_or_equal(lambda: read_tokens(tmp_path / "copy"), good)

    run()


INDEX = {  # where in the index, what is written there, and a word of the refusal
    "magic": (0, b"X", "is not an index"), "version": (9, b"\x02", "is not an index"), "type": (17, b"\x07", "type 7"),
    "unknown type": (17, b"\x63", "type 99"), "sequences": (18, b"\x05", "has "), "many": (18, b"\xff" * 8, "has "),
    "documents": (26, b"\x01", "has "), "length": (34, b"\x04", "begins at byte"),
    "negative": (34, b"\xff" * 4, "length -1"), "last length": (46, b"\x09", ".bin has "),
    "pointer": (58, b"\x02", "begins at byte"), "far pointer": (58, b"\xff" * 7, "begins at byte"),
    "first document": (82, b"\x01", "marks"), "falling": (98, b"\x00", "rise"),
    "last document": (114, b"\x03", "marks"),
}  # fmt: skip


@pytest.mark.parametrize("name", INDEX)
def test_what_an_index_may_not_say(name, token_prefix, tmp_path):
    place, new, word = INDEX[name]
    data = bytearray(Path(f"{token_prefix}.idx").read_bytes())
    data[place : place + len(new)] = new
    (tmp_path / "copy.idx").write_bytes(data)
    shutil.copy(f"{token_prefix}.bin", tmp_path / "copy.bin")
    with pytest.raises(HyLoError, match=f"copy.*{word}"):
        check_token_files(tmp_path / "copy")


@pytest.mark.parametrize("size", [0, 1, 31, 33, 64])
def test_tokens_of_another_size(size, token_prefix, tmp_path):
    shutil.copy(f"{token_prefix}.idx", tmp_path / "copy.idx")
    (tmp_path / "copy.bin").write_bytes(bytes(size))
    with pytest.raises(HyLoError, match=f"copy.bin has {size} bytes, expected 32"):
        check_token_files(tmp_path / "copy")


def test_ids_beyond_the_vocabulary(token_prefix):
    check_token_files(token_prefix, 7)
    with pytest.raises(HyLoError, match="token 10 is 6, expected 0 to 5"):
        check_token_files(token_prefix, 6)


def test_readers_of_tokens_check_them(token_prefix, tmp_path):
    """Packing and calibration; training start has tests of its own."""
    from hylo_megatron.data.pack import pack
    from hylo_megatron.init.calibration import calibration_tokens

    shutil.copy(f"{token_prefix}.idx", tmp_path / "copy.idx")
    (tmp_path / "copy.bin").write_bytes(bytes(30))
    summary = dict(vocab_size=tiny.VOCAB, eod_id=2, pack_length=None, tokens=16, dtype="uint16")
    (tmp_path / "copy.json").write_text(json.dumps(summary))
    tiny.write_tokenizer(tmp_path)
    for read in (
        lambda: pack(tmp_path / "copy", tmp_path / "out", 4),
        lambda: calibration_tokens(tmp_path / "copy", tmp_path, 8, 4),
    ):
        with pytest.raises(HyLoError, match="copy.bin has 30 bytes, expected 32"):
            read()


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
def test_a_file_in_place_of_the_prefix(token_prefix, tmp_path, suffix):
    from hylo_megatron.init.calibration import calibration_tokens
    from hylo_megatron.retrieval.haystack import open_haystack

    tiny.write_tokenizer(tmp_path)
    path = Path(f"{token_prefix}{suffix}")
    for read in (
        lambda: check_token_files(path),
        lambda: calibration_tokens(path, tmp_path, 8, 4),
        lambda: open_haystack(path, None, None, 512),
    ):
        with pytest.raises(HyLoError, match=f"{suffix}: one file of the tokens; give their prefix, {token_prefix}$"):
            read()


SUMMARY = dict(tokens=16, documents=4, sequences=4, pack_length=None, vocab_size=300, eod_id=2, append_eod=True,
               dtype="uint16", tokenizer="tok", inputs=["a.jsonl"])  # fmt: skip


def test_summary_of_tokens(tmp_path):
    @FEW
    @given(mutations.json_texts(SUMMARY))
    def run(text):
        (tmp_path / "data.json").write_bytes(text)
        refused_or_equal(
            lambda: read_summary(tmp_path / "data", ("vocab_size", "eod_id")), SUMMARY,
            lambda got, _: check(dict(got), Summary, "again") == got and got["vocab_size"] > 0,
        )  # fmt: skip

    run()


ANSWERS = {
    "empty": b"", "no array": b"answers", "a pickle": pickle.dumps([1]), "cut": None,
    "floats": np.zeros((4, 4), np.float32), "another shape": np.zeros((4, 5), np.uint8),
}  # fmt: skip


@pytest.mark.parametrize("kind", ANSWERS)
def test_marks_of_answers(kind, tmp_path):
    path, value = tmp_path / "data.answers.npy", ANSWERS[kind]
    np.save(path, np.zeros((4, 4), np.uint8) if value is None or isinstance(value, bytes) else value)
    if not isinstance(value, np.ndarray):
        path.write_bytes(path.read_bytes()[:-3] if value is None else value)
    with pytest.raises(HyLoError, match="data.answers.npy: ") as refusal:
        read_answers(tmp_path / "data", (4, 4))
    assert "\n" not in str(refusal.value)
