"""Malformed configurations, plans and records: each reader returns what is right or says in one line what is wrong."""

import json
from dataclasses import replace

import pytest
from helpers import mutations, tiny
from helpers.malformed import ARCH
from helpers.mutations import FEW, refused_or_equal
from hypothesis import given
from hypothesis import strategies as st

from hylo_megatron.config import Architecture, Plan
from hylo_megatron.errors import HyLoError
from hylo_megatron.hf import HyLoConfig
from hylo_megatron.json_file import parse, read_json
from hylo_megatron.run import records

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
