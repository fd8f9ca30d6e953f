"""Malformed files: each reader returns what is right or says in one line what is wrong, whatever the bytes."""

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from helpers import mutations, tiny
from helpers.mutations import FEW, refused_or_equal
from hypothesis import given
from hypothesis import strategies as st

from hylo_megatron.checkpoint import iterations
from hylo_megatron.checkpoint.folder import CheckpointReader, write_checkpoint
from hylo_megatron.config import Architecture, Plan
from hylo_megatron.convert import megatron_to_hf
from hylo_megatron.convert.hf_to_megatron import megatron_tensors
from hylo_megatron.data.token_files import Summary, check_token_files, read_summary
from hylo_megatron.errors import HyLoError
from hylo_megatron.hf import HyLoConfig
from hylo_megatron.json_file import check, parse, read_json
from hylo_megatron.run import records

ARCH = replace(tiny.hybrid(), extra={"eos_token_id": 2, "ild_norms": [[1.5, 0.5]] * 4})
YARN = replace(ARCH, rope_parameters=tiny.YARN)


def buildable(arch: Architecture) -> bool:
    """A mutation may give another model that is as good; that one has nothing that a model would stumble over."""
    sizes = (arch.vocab_size, arch.hidden_size, arch.head_dim, arch.max_position_embeddings)
    numbers = (arch.rms_norm_eps, arch.rope_parameters["rope_theta"])
    whole = all(type(size) is int and 0 < size < 2**31 for size in sizes)
    finite = all(0 < number < float("inf") and not isinstance(number, bool) for number in numbers)
    return whole and finite and arch.num_attention_heads % arch.num_key_value_heads == 0 and bool(arch.plan)


@pytest.mark.parametrize("good", [ARCH, YARN], ids=["gdn", "yarn"])
def test_architecture(good, tmp_path):
    path = tmp_path / "hylo.json"

    @FEW
    @given(mutations.json_texts(good.to_dict()))
    def run(text):
        path.write_bytes(text)
        refused_or_equal(lambda: Architecture.load(tmp_path), good, lambda got, _: buildable(got))

    run()
    good.save(tmp_path)
    assert Architecture.load(tmp_path) == good


NONSENSE = {  # a field, nonsense, and a word of the refusal
    "vocab_size": (0, "greater"), "hidden_size": (-64, "greater"), "head_dim": ("16", "integer"),
    "num_attention_heads": (True, "integer"), "rms_norm_eps": (-1e-5, "greater"),
    "intermediate_size": (1.5, "integer"),
    "num_key_value_heads": (3, "multiple"), "tie_word_embeddings": (1, "boolean"), "plan": ([], "no layers"),
    "rope_parameters": (None, "object"), "geometry": (None, "missing"), "model_type": ("gpt2", "'llama'"),
    "max_position_embeddings": (None, "integer"), "surprise": (1, "unknown"), "extra": ([1], "object"),
}  # fmt: skip


@pytest.mark.parametrize("name", NONSENSE)
def test_hylo_json_names_the_field(name, tmp_path):
    value, word = NONSENSE[name]
    (tmp_path / "hylo.json").write_text(json.dumps(ARCH.to_dict() | {name: value}))
    with pytest.raises(HyLoError) as refusal:
        Architecture.load(tmp_path)
    said = str(refusal.value)
    assert said.startswith(f"{tmp_path}/hylo.json: ") and name in said and word in said


ROPES = [
    {}, {"rope_type": "default"}, {"rope_type": "default", "rope_theta": None},
    {"rope_type": "linear", "rope_theta": 1e4},
    {"rope_type": "default", "rope_theta": 0}, {"rope_type": "default", "rope_theta": -1.0},
    {"rope_type": "default", "rope_theta": True}, {"rope_type": "default", "rope_theta": "1e4"},
    {"rope_type": "nope", "rope_theta": 1e4}, {"rope_type": None, "rope_theta": 1e4},
    tiny.YARN | {"factor": 0}, tiny.LLAMA3 | {"low_freq_factor": None},
]  # fmt: skip


@pytest.mark.parametrize("rope", ROPES, ids=str)
def test_rope_parameters(rope, tmp_path):
    (tmp_path / "hylo.json").write_text(json.dumps(ARCH.to_dict() | {"rope_parameters": rope}))
    with pytest.raises(HyLoError, match="hylo.json: .*rope"):
        Architecture.load(tmp_path)
    with pytest.raises(HyLoError, match="config.json: .*rope"):
        HyLoConfig(rope_parameters=rope)


def test_files_of_earlier_versions_load(tmp_path):
    """Fields that came later have defaults."""
    values = ARCH.to_dict()
    for name in ("attention_bias", "qk_norm", "mla_qk_norm", "extra"):
        del values[name]
    del values["geometry"]["gdn"]["norm_eps"]
    (tmp_path / "hylo.json").write_text(json.dumps(values))
    assert Architecture.load(tmp_path) == replace(ARCH, extra={})


CONFIG = HyLoConfig.from_architecture(ARCH).to_dict()


@FEW
@given(mutations.json_values(CONFIG))
def test_config_of_a_hybrid(values):
    if isinstance(values, dict):  # transformers itself refuses others
        refused_or_equal(lambda: HyLoConfig.from_dict(values).to_architecture(), ARCH, lambda got, _: buildable(got))


@pytest.mark.parametrize("name", ["mixers", "rope_parameters", "rms_norm_eps", "num_attention_heads"])
def test_config_without_what_the_model_computes_with(name):
    values = {key: value for key, value in CONFIG.items() if key != name}
    with pytest.raises(HyLoError, match=f"config.json: field {name} is missing"):
        HyLoConfig.from_dict(values)


# ---- checkpoints ----


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


# ---- tokens ----


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
    from hylo_megatron.data.packed_data import PackedDataset

    path, value = tmp_path / "data.answers.npy", ANSWERS[kind]
    np.save(path, np.zeros((4, 4), np.uint8) if value is None or isinstance(value, bytes) else value)
    if not isinstance(value, np.ndarray):
        path.write_bytes(path.read_bytes()[:-3] if value is None else value)
    with pytest.raises(HyLoError, match="data.answers.npy: ") as refusal:
        PackedDataset._read_answers(path, (4, 4))
    assert "\n" not in str(refusal.value)


# ---- plans ----

PLANS = [
    "1,1", "0,0,3", "-1", "4", "9" * 5000, "1," * 3000, "", ",", "1,,2", " ", "uniform:", "uniform:9", "uniform:-1",
    "uniform:" + "9" * 5000, "１", "٣", "1_0", "+1", "0x1", "1.0", "1e0", "\x00", "all,1", "2MLA2XYZ", "3MLA2GDN",
    "9" * 5000 + "MLA2GDN", "2MLA" + "2" * 5000 + "GDN", "２MLA２GDN", "2MLA2GDN\n",
]  # fmt: skip


@pytest.mark.parametrize("text", PLANS, ids=lambda text: repr(text[:12]))
def test_layer_plans_that_are_none(text):
    with pytest.raises(HyLoError) as refusal:
        Plan.parse(4, text)
    assert len(str(refusal.value)) < 300


@FEW
@given(st.text(alphabet="0123456789,:-+ ._MLAGDNuniformall１٣\n", max_size=12))
def test_any_layer_plan(text):
    refused_or_equal(
        lambda: Plan.parse(4, text), None, lambda got, _: len(got) == 4 and set(got) <= {"mla", "gdn", "mamba2"}
    )


# ---- JSON, and what runs leave ----


NO_JSON = ["", "{", "[" * 100_000, '{"a":' * 100_000, "NaN", '{"a": -Infinity}', "1e999", "9" * 5000, b"\xff", "{} {}"]


@pytest.mark.parametrize("text", NO_JSON, ids=lambda text: repr(text[:9]))
def test_text_that_is_no_json(text):
    with pytest.raises(HyLoError, match="^here: not valid JSON .*; do this$"):
        parse(text, "here", "do this")


@pytest.mark.parametrize("value", [[], 7, "x", None, True])
def test_json_that_is_no_object(value, tmp_path):
    (tmp_path / "file.json").write_text(json.dumps(value))
    with pytest.raises(HyLoError, match="file.json: field the whole is"):
        read_json(tmp_path / "file.json")


PART = dict(loss=2.5, perplexity=12.2, tokens=100, note="kept")
FIGURES = dict(perplexity={"prose": PART}, kv_cache_bytes_per_token=640,
               needle=dict(by_length=[dict(length=64, hits=1, samples=2)]))  # fmt: skip
RECORDS = {
    "report": (records.read_report, dict(model=FIGURES, teacher=FIGURES, versions={"torch": "2"}, device="cpu")),
    "sample": (records.read_sample, dict(prompt="a", teacher="b", student="c")),
    "steps": (records.read_steps, dict(iteration=1, loss=2.5, seconds=None, memory_gib=0.0)),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_what_runs_leave(kind, tmp_path):
    read, good = RECORDS[kind]
    path = tmp_path / "file.json"
    path.write_text(json.dumps(good))
    assert read(path) == ([good] if kind == "steps" else good)

    @FEW
    @given(mutations.json_texts(good))
    def run(text):
        path.write_bytes(text)
        refused_or_equal(lambda: read(path), good, lambda got, _: True)

    run()
