"""What ``hylo evaluate`` refuses, before it loads a model."""

import json
import shutil

import pytest
import torch
from helpers.evaluation import make_model, random_hybrid, write_lines

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import models as hf_models
from hylo_megatron.evaluate.runner import evaluate
from hylo_megatron.evaluate.settings import Settings


def test_bad_paths_and_settings(tmp_path, folder, prose):
    bad_line = tmp_path / "bad.jsonl"
    bad_line.write_text('{"text": "fine"}\n{"words": 3}\n')
    empty = tmp_path / "empty"
    empty.mkdir()
    for message, model, options in (
        ("model folder .* not found", tmp_path / "absent", {}),
        ("no config.json", empty, {}),
        ("model folder .* not found", folder, {"teacher_dir": tmp_path / "absent"}),
        ("absent.jsonl: no such file", folder, {"prose": tmp_path / "absent.jsonl"}),
        ("bad.jsonl:2: expected a string under 'text'", folder, {"prose": bad_line}),
        ("training log .* not found", folder, {"out_dir": tmp_path / "out", "curves": [tmp_path / "absent.jsonl"]}),
        ("training log .*prose.jsonl has no losses", folder, {"out_dir": tmp_path / "out", "curves": [prose]}),
        ("--code: the name of the file is empty", folder, {"code": ""}),
        ("--format text: is that of text files, and none is given", folder, {"settings": Settings(form="text")}),
        ("--device abacus: cannot be used", folder, {"settings": Settings(device="abacus")}),
        ("--dtype int3: expected auto", folder, {"settings": Settings(dtype="int3")}),
    ):
        with pytest.raises(HyLoError, match=message):
            evaluate(model, **options)
    for wrong in (
        {"context": 1}, {"long_context": 1}, {"long_documents": 0}, {"needle_lengths": ()}, {"skip": ("all",)},
        {"batch_size": 0}, {"teacher_needle_limit": 512},
    ):  # fmt: skip
        with pytest.raises(HyLoError):
            Settings(**wrong)


def test_folder_that_does_not_fit(tmp_path, tokenizer):
    small, thin = tmp_path / "small", tmp_path / "thin"
    make_model(tokenizer, vocab_size=len(tokenizer) - 1).save_pretrained(small)
    make_model(tokenizer).save_pretrained(thin)
    config = json.loads((thin / "config.json").read_text())
    (thin / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    for path, message in ((small, "do not belong together"), (thin, "weights are missing")):
        with pytest.raises(HyLoError, match="has no tokenizer"):
            evaluate(path)
        tokenizer.save_pretrained(path)
        with pytest.raises(HyLoError, match=message):
            evaluate(path)


@pytest.mark.parametrize("template, message", [
    ([{"name": name, "template": "{{ messages }}"} for name in "ab"], "has the chat templates a, b and none is the"),
    ("{% for m in %}", "does not render a question .Expected an expression"),
    ("{{ raise_exception('no questions') }}", "does not render a question .no questions"),
])  # fmt: skip
def test_what_would_end_an_evaluation_late_is_refused_first(tmp_path, folder, prose, template, message, monkeypatch):
    spoilt = tmp_path / "spoilt"
    shutil.copytree(folder, spoilt)
    (spoilt / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((spoilt / "tokenizer_config.json").read_text())
    (spoilt / "tokenizer_config.json").write_text(json.dumps(config | {"chat_template": template}))
    few = {"ppl_tokens": 64, "needle_samples": 1, "needle_depths": 1, "context": 64}
    alone = evaluate(spoilt, prose=prose, settings=Settings(**few, skip=("needle",)))
    assert alone["model"]["perplexity"]["prose"]["perplexity"] > 1  # no questions, and no template for them
    monkeypatch.setattr(hf_models, "load", lambda *_: pytest.fail("a model was loaded first"))
    with pytest.raises(HyLoError, match=message):
        evaluate(spoilt, teacher_dir=folder, prose=prose, settings=Settings(**few, needle_lengths=(512,)))
    with pytest.raises(HyLoError, match="--needle-lengths 20: too short"):
        evaluate(folder, prose=prose, settings=Settings(**few, needle_lengths=(20, 512)))


SHORT = [{"question": f"{n} + 1?", "answers": [str(n + 1)]} for n in range(3)]
SUM = {"question": "1 + 1?", "options": ["2", "3"], "answer": 0}
ONE_DOCUMENT = {"question": "Where?", "context": "Here.", "answers": {"text": ["Here"]}}
CHAT = {"messages": [{"role": "user", "content": "Hello there, how are you today? Fine, I hope."}]}
LATE = {  # rows of files by kind, settings, and what is refused
    "ruler": ({}, {"suites": ("ruler",), "ruler_lengths": (4096, 300)}, "--ruler-lengths 300: too short for niah"),
    "shots": ({"answers": SHORT}, {}, "answers.jsonl:1: 3 questions, too few for --shots 3: give fewer"),
    "letters": ({"choice": [SUM] * 4}, {}, "choice.jsonl:1: every question is an example of --shots 3: give fewer"),
    "room": ({"answers": [*SHORT, SHORT[0] | {"question": "very long " * 99}]}, {"shots": 0, "context": 300},
             r"answers.jsonl:4: the prompt has .* expected at most 276: raise --context or lower --shots"),
    "options": ({"choice": [SUM, SUM | {"options": ["2", "very long " * 99]}]}, {"shots": 0, "context": 300},
                r"choice.jsonl:2: the prompt has .* expected at most 276: raise --context or lower --shots"),
    "long": ({"long": [{"text": "A short text. " * 9}]}, {"long_context": 4096}, "holds no document of 4,096 tokens"),
    "one token": ({"code": [{"text": "a"}]}, {}, "code.jsonl holds no document of two tokens or more"),
    "sentences": ({"prose": [{"text": "no sentence " * 99}]}, {}, "prose.jsonl has no sentences to hide a needle in"),
    "words": ({"prose": [{"text": "We are one as he is, so be it. " * 9}]}, {}, "has no words of 4 to 9 lower-case"),
    "squad": ({"ruler_squad": [ONE_DOCUMENT] * 2}, {"suites": ("ruler",), "ruler_lengths": (8192,)},
              "qa_1: its file has one question's documents only"),
    "chats": ({"prose": [CHAT]}, {"suites": ("ruler",)}, "prose.jsonl: has conversations, expected prose"),
}  # fmt: skip


@pytest.mark.parametrize("name", LATE)
def test_what_a_suite_would_refuse_late_is_refused_before_a_model_is_loaded(
    name, tmp_path, folder, prose, monkeypatch
):
    rows, changes, message = LATE[name]
    files = {kind: write_lines(tmp_path / f"{kind}.jsonl", found) for kind, found in rows.items()}
    monkeypatch.setattr(hf_models, "load", lambda *_: pytest.fail("a model was loaded first"))
    with pytest.raises(HyLoError, match=message):
        evaluate(folder, teacher_dir=folder, settings=Settings(**changes), **({"prose": prose} | files))


def test_models_that_cannot_be_measured_are_refused_before_the_others_are(tmp_path, folder, prose, monkeypatch):
    def changed(name: str, **fields):
        shutil.copytree(folder, tmp_path / name)
        config = json.loads((folder / "config.json").read_text())
        (tmp_path / name / "config.json").write_text(json.dumps(config | fields))
        return tmp_path / name

    def other(name: str, **config):
        shutil.copytree(folder, tmp_path / name)
        (tmp_path / name / "config.json").write_text(json.dumps(config))
        return tmp_path / name

    cut, gpt2 = changed("cut"), other("gpt2", model_type="gpt2", n_positions=128)
    weights = cut / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    scaled = changed("scaled", rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 10000.0})
    monkeypatch.setattr(hf_models, "load", lambda *_: pytest.fail("a model was loaded first"))
    for message, model, options in (
        ("cut/model.safetensors: truncated or damaged .*download it again", cut, {}),
        ("unknown: its config.json cannot be read", changed("unknown", model_type="abacus"), {}),
        ("classes: model_type 'vit' is no causal language model", changed("classes", model_type="vit"), {}),
        ("llama scales or caps its logits", changed("caps", final_logit_softcapping=30.0), {}),
        ("--needle-lengths 2048: .*gpt2 has positions for 128 tokens", gpt2, {"settings": Settings(context=128)}),
        ("--context 2048: .*gpt2 has positions for 128 tokens and no more; give less", gpt2, {}),
        ("model_type 'mamba2' has no attention", other("states", model_type="mamba2"), {}),
        ("YaRN needs a base model", folder, {"teacher_dir": scaled, "settings": Settings(teacher_yarn=2.0)}),
    ):
        with pytest.raises(HyLoError, match=message):
            evaluate(model, **({"teacher_dir": folder, "prose": prose} | options))


def test_yarn_and_suites_that_cannot_be_measured(tmp_path, folder, prose, tokenizer):
    hybrid = tmp_path / "hybrid"
    random_hybrid(tokenizer, "gdn").save_pretrained(hybrid)
    tokenizer.save_pretrained(hybrid)
    yarn = Settings(teacher_yarn=2.0)
    for message, options in (
        ("--teacher-yarn measures the teacher once more, with YaRN: give --teacher", {"settings": yarn}),
        ("suite choice has no file to measure on: give --choice", {"settings": Settings(suites=("choice",))}),
        ("suite needle has no file to measure on: give --prose", {"settings": Settings(suites=("needle",))}),
        ("--choice: two files have one name", {"choice": [prose, tmp_path / "other" / prose.name]}),
    ):
        with pytest.raises(HyLoError, match=message):
            evaluate(folder, **options)
    with pytest.raises(HyLoError, match=r"config.json: rope_type is .*; YaRN needs a base model with rope_type 'def"):
        hf_models.load(hybrid, hf_models.resolve_device("cpu"), torch.float32, yarn=2.0)


def test_a_file_that_no_suite_reads_is_refused(tmp_path, folder, prose):
    short = [write_lines(tmp_path / "short.jsonl", [{"question": "1 + 1?", "answers": ["2"]}])]
    squad = write_lines(
        tmp_path / "squad.jsonl", [{"question": "Where?", "context": "Here.", "answers": {"text": ["Here"]}}] * 2
    )
    needle, skip = Settings(suites=("needle",)), Settings(skip=("answers",))
    for message, options in (
        ("no chosen suite reads --ruler-squad: name ruler in", {"prose": prose, "ruler_squad": squad}),
        ("no chosen suite reads --answers: name answers in", {"prose": prose, "answers": short, "settings": needle}),
        ("--skip answers leaves nothing to measure", {"answers": short, "settings": skip}),
    ):
        with pytest.raises(HyLoError, match=message):
            evaluate(folder, **options)
