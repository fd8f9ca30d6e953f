"""One tokenizer from the base model's folder to the exported one: its files, its ids, its templates, its verdicts."""

import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import tiny
from helpers import tokenizer_kinds as kinds

pytest.importorskip("transformers")
from helpers.tokenizer_kinds import added
from transformers import AutoTokenizer, PreTrainedTokenizerFast

import hylo_megatron  # noqa: F401
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf
from hylo_megatron.convert.pair import check_pair
from hylo_megatron.convert.tokenizer_files import (
    check_tokenizer,
    copy_companions,
    open_tokenizer,
    tokenizer_identity,
)
from hylo_megatron.data import prepare
from hylo_megatron.data.tokenizers import load_tokenizer
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import models as evaluated
from hylo_megatron.hf import HyLoConfig
from hylo_megatron.init.calibration import calibration_tokens
from hylo_megatron.init.upcycle import upcycle
from hylo_megatron.train import write_companions

TEMPLATE = "{% for m in messages %}{{ m.content }}{% endfor %}"


@pytest.fixture(scope="module")
def trained() -> dict:
    return {kind.__name__: kind() for kind in kinds.KINDS}


def exported(source: Path, target: Path) -> Path:
    """What export writes of a checkpoint's ``hf`` folder, beside a hybrid's config."""
    copy_companions(source, target.with_name("checkpoint"))
    copy_companions(target.with_name("checkpoint"), target, with_config=False)
    HyLoConfig(mixers=["mla", "gdn"]).save_pretrained(target)
    return target


# ---- the same ids everywhere ----


@pytest.mark.parametrize("named", kinds.CLASSES)
@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.__name__)
def test_ids_of_all_tools_are_those_of_tokenizer_json(trained, kind, named, tmp_path):
    raw = trained[kind.__name__]
    source = kinds.write(tmp_path / "hf", raw, named, "llama")
    folder = exported(source, tmp_path / "out")
    opened = {
        "served": AutoTokenizer.from_pretrained(folder),
        "ours": open_tokenizer(source),
        "a converted teacher": AutoTokenizer.from_pretrained(folder.with_name("checkpoint")),
        "an earlier export": AutoTokenizer.from_pretrained(kinds.write(tmp_path / "old", raw, named, "hylo")),
    }
    for name, tokenizer in opened.items():
        for special in (False, True):
            for text in kinds.PROBES:
                want = raw.encode(text, add_special_tokens=special).ids
                assert tokenizer(text, add_special_tokens=special).input_ids == want, (name, text)
    assert load_tokenizer(source, 1).encode(kinds.PROBES) == [
        raw.encode(text, add_special_tokens=False).ids for text in kinds.PROBES
    ]
    assert opened["served"].special_tokens_map == opened["ours"].special_tokens_map
    assert tokenizer_identity(folder) == tokenizer_identity(source)


@pytest.mark.parametrize("named", ["Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_folder_without_tokenizer_json_gets_one(trained, named, tmp_path):
    source = kinds.write(tmp_path / "hf", trained["byte_level"], named, "llama")
    model = json.loads((source / "tokenizer.json").read_text())["model"]
    (source / "tokenizer.json").unlink()
    (source / "vocab.json").write_text(json.dumps(model["vocab"]))
    (source / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in model["merges"]))
    want = AutoTokenizer.from_pretrained(source)
    got = AutoTokenizer.from_pretrained(exported(source, tmp_path / "out"))
    assert type(want).__name__ == named and type(got) is PreTrainedTokenizerFast
    assert [got(text).input_ids for text in kinds.PROBES] == [want(text).input_ids for text in kinds.PROBES]
    assert (got.eos_token, got.pad_token) == (want.eos_token, want.pad_token)
    assert tokenizer_identity(source) == tokenizer_identity(tmp_path / "out")


@pytest.mark.parametrize("rule, words", [("identity", None), ("nmt_nfkc", "gives other ids for")])
def test_a_sentencepiece_model_is_converted_exactly_or_refused(rule, words, tmp_path):
    sentencepiece = pytest.importorskip("sentencepiece")
    (tmp_path / "text").write_text("\n".join(kinds.CORPUS * 10))
    source = kinds.write(tmp_path / "hf", kinds.word_level(), "LlamaTokenizer", "llama", add_bos_token=True)
    (source / "tokenizer.json").unlink()
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text"), model_prefix=str(source / "tokenizer"), vocab_size=340, model_type="bpe",
        byte_fallback=True, normalization_rule_name=rule, remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    if words:
        with pytest.raises(HyLoError, match=words):
            tokenizer_identity(source)
        return
    got, want = (
        AutoTokenizer.from_pretrained(exported(source, tmp_path / "out")),
        AutoTokenizer.from_pretrained(source),
    )
    assert [got(text).input_ids for text in kinds.PROBES] == [want(text).input_ids for text in kinds.PROBES]
    assert got("ships").input_ids[0] == got.bos_token_id == 1
    assert tokenizer_identity(source) == tokenizer_identity(tmp_path / "out")


def test_a_folder_that_needs_no_change_is_copied_byte_for_byte(trained, tmp_path):
    source = kinds.write(tmp_path / "hf", trained["byte_level"], "PreTrainedTokenizerFast")
    exported(source, tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (source / name).read_bytes()


@pytest.mark.parametrize("named", ["OwnTokenizer", "PreTrainedTokenizerFast"])
def test_a_tokenizer_with_code_of_its_own_is_read_from_tokenizer_json(trained, named, tmp_path):
    own = {"AutoTokenizer": [None, "tokenization_own.OwnTokenizer"]}
    source = kinds.write(tmp_path / "hf", trained["byte_level"], named, "llama", auto_map=own)
    (source / "tokenization_own.py").write_text("raise SystemExit")
    folder = exported(source, tmp_path / "out")
    assert "auto_map" not in json.loads((folder / "tokenizer_config.json").read_text())
    got = AutoTokenizer.from_pretrained(folder)
    assert got(kinds.CORPUS[1]).input_ids == trained["byte_level"].encode(kinds.CORPUS[1]).ids


def test_tokens_that_only_the_config_adds_count(trained, tmp_path):
    """transformers gives a special token that tokenizer.json lacks the next free id."""
    plain = kinds.write(tmp_path / "plain", trained["byte_level"], "LlamaTokenizerFast")
    padded = kinds.write(tmp_path / "padded", trained["byte_level"], "LlamaTokenizerFast", pad_token="[PAD]")
    less, more = tokenizer_identity(plain), tokenizer_identity(padded)
    assert (more.size, more.largest_id) == (less.size + 1, less.largest_id + 1)
    assert more.fingerprint != less.fingerprint
    assert tokenizer_identity(exported(padded, tmp_path / "out")) == more
    with pytest.raises(HyLoError, match=f"ids up to {more.largest_id}.*vocab_size is {less.size}"):
        check_tokenizer(padded, less.size)
    check_tokenizer(plain, less.size)


# ---- templates ----


def test_named_templates_travel_from_the_base_to_the_exported_folder(tmp_path):
    model = tiny.teacher_model("llama", num_hidden_layers=1)
    hf = tiny.save_model(model, tmp_path / "hf")
    (hf / "chat_template.jinja").write_text(TEMPLATE)
    (hf / "additional_chat_templates").mkdir()
    (hf / "additional_chat_templates" / "tool_use.jinja").write_text("tools" + TEMPLATE)
    (hf / "additional_chat_templates" / "notes.txt").write_text("read by nobody")
    (hf / "modeling_own.py").write_text("raise SystemExit")
    hf_to_megatron.convert(hf, tmp_path / "teacher")
    upcycle(tmp_path / "teacher", tmp_path / "student", ("mla",), init="svd", log=lambda line: None)
    run = dict(hylo_student=tmp_path / "student", save=tmp_path / "run", hylo_rope=None, seq_length=64, load=None)
    write_companions(SimpleNamespace(**run))  # what training leaves beside its weights
    shutil.copytree(tmp_path / "student", tmp_path / "run", ignore=shutil.ignore_patterns("hf"), dirs_exist_ok=True)
    megatron_to_hf.convert(tmp_path / "run", tmp_path / "out")
    want = {"default": TEMPLATE, "tool_use": "tools" + TEMPLATE}
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == want
    found = {path.name for path in (tmp_path / "out").rglob("*")}
    assert "notes.txt" not in found and "modeling_own.py" not in found


@pytest.mark.parametrize("written", [
    [{"name": "default", "template": TEMPLATE}, {"name": "rag", "template": "r" + TEMPLATE}],
    {"default": TEMPLATE, "rag": "r" + TEMPLATE},
])  # fmt: skip
def test_templates_in_the_config_travel(trained, written, tmp_path):
    source = kinds.write(tmp_path / "hf", trained["byte_level"], "LlamaTokenizerFast", chat_template=written)
    want = AutoTokenizer.from_pretrained(source).chat_template
    assert AutoTokenizer.from_pretrained(exported(source, tmp_path / "out")).chat_template == want


# ---- one verdict about ids beyond the rows ----


def test_every_tool_refuses_ids_beyond_the_rows_in_the_same_words(tmp_path):
    model = tiny.teacher_model("llama", num_hidden_layers=1)
    whole = tiny.save_model(model, tmp_path / "whole")
    hf_to_megatron.convert(whole, tmp_path / "ckpt")
    arch = replace(tiny.hybrid(), vocab_size=tiny.VOCAB)
    large = tmp_path / "large"
    shutil.copytree(whole, large)
    tiny.write_tokenizer(large, tiny.VOCAB + 1)
    text = tmp_path / "text.txt"
    text.write_text("w5 w6 w7 " * 100)
    shutil.copytree(tmp_path / "ckpt", tmp_path / "damaged")
    tiny.write_tokenizer(tmp_path / "damaged" / "hf", tiny.VOCAB + 1)
    pair = (tmp_path / "damaged", tmp_path / "damaged")
    tools = {
        "convert": lambda: hf_to_megatron.convert(large, tmp_path / "out"),
        "prepare": lambda: prepare.prepare([text], large, tmp_path / "tokens"),
        "evaluate": lambda: evaluated.load(large, evaluated.resolve_device("cpu"), evaluated.DTYPES["float32"]),
        "export": lambda: megatron_to_hf.convert(tmp_path / "damaged", tmp_path / "out"),
        "train": lambda: check_pair(arch, arch.as_teacher(), stage_kind("distill"), pair),
        "calibrate": lambda: calibration_tokens(text, tmp_path / "damaged" / "hf", 64, 32),
    }
    words = r"tokenizer\.json: the tokenizer makes ids up to 300, the model's vocab_size is 300; they do not belong"
    for name, tool in tools.items():
        with pytest.raises(HyLoError, match=words):
            pytest.fail(f"{name} accepted it: {tool()}")
    tiny.write_tokenizer(large, tiny.VOCAB - 40)  # rows that no token needs
    hf_to_megatron.convert(large, tmp_path / "padded")
    assert prepare.prepare([text], large, tmp_path / "tokens")["vocab_size"] == tiny.VOCAB - 40


def test_tokens_of_another_tokenizer_do_not_calibrate(tmp_path):
    for name, size in (("one", 300), ("other", 300)):
        (tmp_path / name).mkdir()
        tiny.write_tokenizer(tmp_path / name, size)
    words = json.loads((tmp_path / "other" / "tokenizer.json").read_text())
    words["model"]["vocab"] |= {"w5": 6, "w6": 5}
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(words))
    text = tmp_path / "text.txt"
    text.write_text("w5 w6 w7 " * 100)
    text = [text] * 4
    made = prepare.prepare(text, tmp_path / "other", tmp_path / "tokens")
    assert made["tokenizer_fingerprint"] == tokenizer_identity(tmp_path / "other").fingerprint
    assert calibration_tokens(tmp_path / "tokens", tmp_path / "other", 64, 32).shape == (2, 32)
    with pytest.raises(HyLoError, match="tokens.*made with another tokenizer.*make the tokens again"):
        calibration_tokens(tmp_path / "tokens", tmp_path / "one", 64, 32)


def test_ids_with_gaps_fit_into_the_token_file(trained, tmp_path):
    """70,000 is the largest of few ids: 16 bits would not hold it."""
    source = kinds.write(tmp_path / "hf", trained["word_level"], "PreTrainedTokenizerFast")
    content = json.loads((source / "tokenizer.json").read_text())
    content["model"]["vocab"]["ships"] = 70_000
    (source / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "text.txt").write_text("ships and ships")
    made = prepare.prepare([tmp_path / "text.txt"], source, tmp_path / "tokens")
    assert made["dtype"] == "int32" and made["vocab_size"] == len(content["model"]["vocab"])


# ---- a teacher of the same size ----


CHANGES = {
    "a word": lambda c: c["model"]["vocab"].update(w5=6, w6=5),
    "the normalizer": lambda c: c.update(normalizer={"type": "Lowercase"}),
    "the pre-tokenizer": lambda c: c.update(pre_tokenizer={"type": "WhitespaceSplit"}),
    "an added token": lambda c: c["added_tokens"].append(added("w7", 7)),
}
SAME = {
    "the decoder": lambda c: c.update(decoder={"type": "Fuse"}),
    "truncation": lambda c: c.update(
        truncation={"direction": "Right", "max_length": 8, "strategy": "LongestFirst", "stride": 0}
    ),
}


@pytest.mark.parametrize("what", CHANGES | SAME)
def test_a_teacher_of_the_same_size_with_another_tokenizer(what, tmp_path):
    for name in ("student", "teacher"):
        (tmp_path / name / "hf").mkdir(parents=True)
        tiny.write_tokenizer(tmp_path / name / "hf")
    path = tmp_path / "teacher" / "hf" / "tokenizer.json"
    content = json.loads(path.read_text())
    (CHANGES | SAME)[what](content)
    path.write_text(json.dumps(content))
    tiny.edit_json(path.with_name("tokenizer_config.json"), chat_template=TEMPLATE)
    arch = tiny.hybrid()
    pair = (arch, arch.as_teacher(), stage_kind("distill"), (tmp_path / "student", tmp_path / "teacher"))
    if what in SAME:
        return check_pair(*pair)
    with pytest.raises(HyLoError, match="vocabularies differ: 300 and 300 rows.*other ids.*same family"):
        check_pair(*pair)
