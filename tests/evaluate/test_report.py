"""Whole evaluations: files and comparisons."""

import json
import math
import re
import subprocess
import sys

import pytest
import torch
from helpers.evaluation import make_model, make_prose, write_lines
from helpers.paths import ROOT
from helpers.waits import PATIENCE
from transformers import DynamicCache, MistralConfig, Qwen2Config, Qwen3Config

from hylo_megatron.evaluate import models as hf_models
from hylo_megatron.evaluate import suites
from hylo_megatron.evaluate.command import main
from hylo_megatron.evaluate.plots import read_log, running_mean
from hylo_megatron.evaluate.runner import evaluate
from hylo_megatron.evaluate.settings import Settings
from hylo_megatron.hf.configuration_hylo import HyLoConfig


def test_report_files(tmp_path, folder, prose):
    log = tmp_path / "train.jsonl"
    lines = [{"stage": stage, "iteration": i, "loss": 5 / i} for stage in ("ild", "kl") for i in range(1, 60)]
    write_lines(log, [{"event": "start"}, *lines])
    with log.open("a") as file:
        file.write('{"stage": "kl", "itera')  # stopped while writing
    settings = Settings(
        context=128, ppl_tokens=300, long_context=300, long_documents=2, needle_lengths=(450, 500), needle_samples=1,
        needle_depths=2, teacher_needle_limit=460,
    )  # fmt: skip
    out = tmp_path / "out"
    files = {"out_dir": out, "prose": prose, "code": prose, "c": prose, "long": prose, "curves": [log]}
    report = evaluate(folder, teacher_dir=folder, settings=settings, **files)
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(report))
    assert report["model"]["name"] == "tiny" and report["model"]["kv_cache_bytes_per_token"] == 2 * (2 * 2 * 8 * 2)
    assert report["ratios"] == {
        "kv_cache": 1.0, "perplexity_prose": 1.0, "perplexity_code": 1.0, "perplexity_c": 1.0, "perplexity_long": 1.0
    }  # fmt: skip
    assert report["model"]["perplexity"]["prose"]["tokens"] == 300
    assert report["model"]["long"]["documents"] == 2 and report["model"]["long"]["tokens"] == 2 * 299
    assert [row["length"] for row in report["teacher"]["needle"]["by_length"]] == [450]
    assert report["teacher"]["needle"]["not_run"] == [500] and report["model"]["needle"]["not_run"] == []
    again = evaluate(
        folder, teacher_figures=report["teacher"], out_dir=tmp_path / "again", prose=prose, settings=settings
    )
    assert again["teacher"] == report["teacher"] and again["ratios"] == {"kv_cache": 1.0, "perplexity_prose": 1.0}
    for name in ("needle.png", "loss_by_position.png", "loss_curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    text = (out / "evaluation.md").read_text()
    assert "|  | teacher | model | model / teacher |" in text and "| perplexity, C |" in text
    assert "| needle, 450 tokens | 0 % (0/2; 0–66) | 0 % (0/2; 0–66) | +0.0 points (-65.8 to +65.8) |" in text
    assert "| needle, 500 tokens | not run | 0 % (0/2; 0–66) |  |" in text
    assert "## Loss by position, long documents\n\nNats a token, 598 tokens of 2 documents." in text
    assert f"{report['model']['perplexity']['prose']['perplexity']:.3f}" in text
    assert not list(out.glob("*.partial*")) and str(tmp_path) not in text + (out / "evaluation.json").read_text()


def test_model_alone_without_needles(tmp_path, folder, prose):
    report = evaluate(folder, out_dir=tmp_path, prose=prose, settings=Settings(ppl_tokens=60, skip=("needle",)))
    assert "teacher" not in report and "needle" not in report["model"] and report["ratios"] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation.html", "evaluation.json", "evaluation.md", "loss_by_position.png"
    ]  # fmt: skip


def test_cache_of_a_transformer_counts_the_layers_whose_cache_grows():
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "num_key_value_heads": 2}
    window = dict(use_sliding_window=True, sliding_window=16, max_position_embeddings=64)
    kinds = ["sliding_attention", "full_attention", "sliding_attention"]
    config = Qwen3Config(**sizes, head_dim=8, layer_types=kinds, **window)
    assert hf_models.layer_plan(config) == ["sliding_attention", "attention", "sliding_attention"]
    assert hf_models.kv_bytes_per_token(config) == 2 * 2 * 2 * 8
    assert hf_models.window_cache_bytes(config) == 2 * 16 * 64
    config = Qwen3Config(**sizes, head_dim=8)
    assert hf_models.layer_plan(config) == ["attention"] * 3 and hf_models.kv_bytes_per_token(config) == 3 * 64


@pytest.mark.parametrize("kind", [Qwen2Config, MistralConfig])
def test_cache_of_layers_with_windows_grows_up_to_the_window(kind):
    """A window as long as the model's longest text never slides; transformers' cache says what is kept."""
    sizes = {"num_hidden_layers": 3, "num_attention_heads": 4, "hidden_size": 32, "num_key_value_heads": 2}
    more = dict(use_sliding_window=True, max_window_layers=0) if kind is Qwen2Config else {}
    long, short = (kind(**sizes, **more, sliding_window=size, max_position_embeddings=64) for size in (64, 16))
    assert (hf_models.kv_bytes_per_token(long), hf_models.window_cache_bytes(long)) == (3 * 64, 0)
    assert (hf_models.kv_bytes_per_token(short), hf_models.window_cache_bytes(short)) == (0, 3 * 16 * 64)
    assert hf_models.layer_plan(short) == ["sliding_attention"] * 3
    assert hf_models.kv_bytes_per_token(short, length=16) == 3 * 64  # rows of --length 16
    cache = DynamicCache(config=short)
    cache.update(*torch.zeros(2, 1, 2, 40, 8), 0)
    assert cache.layers[0].keys.shape[2] == 16 - 1  # without the token that reads them


def test_cache_of_a_hybrid_counts_mla_rows():
    config = HyLoConfig(mixers=["gdn", "mla", "gdn", "gdn", "mla"], kv_lora_rank=256, qk_rope_head_dim=64)
    assert hf_models.kv_bytes_per_token(config) == 2 * 2 * (256 + 64)


def test_log_of_a_resumed_run(tmp_path):
    records = [{"stage": "kl", "iteration": i, "loss": loss} for i, loss in ((1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0))]
    assert read_log(write_lines(tmp_path / "log.jsonl", records)) == {"kl": [(1, 3.0), (2, 2.0), (3, 1.0)]}
    assert running_mean([4.0, 2.0, 6.0, 1.0], 2) == [4.0, 4.0, 3.0, 3.5]


def test_a_text_that_begins_with_a_row_is_read_as_format_says(tmp_path, folder, monkeypatch):
    """Every suite that reads text takes ``--format``; by default the contents decide."""
    notes = tmp_path / "notes.md"
    notes.write_text(f'{{"text": "A row."}}\n{make_prose(0, 200)}\n')
    flags = "--suite perplexity long needle ruler --context 64 --ppl-tokens 64 --long-context 96 --needle-lengths 512"
    flags += " --needle-samples 1 --needle-depths 1 --ruler-lengths 1500 --ruler-samples 1"
    files = ["--prose", str(notes), "--long", str(notes)]
    command = ["hylo evaluate", "--model", str(folder), "--out", str(tmp_path / "out"), *files, *flags.split()]
    monkeypatch.setattr(suites, "answerer", lambda *_: lambda prompts: ((i, "") for i in range(len(prompts))))
    monkeypatch.setattr(sys, "argv", command)
    with pytest.raises(SystemExit):
        main()
    monkeypatch.setattr(sys, "argv", [*command, "--format", "text"])
    main()
    report = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    found = report["model"]
    assert found["perplexity"]["prose"]["tokens"] == 63 and found["long"]["documents"] == 1
    assert found["needle"]["samples"] and len(found["ruler"]["tasks"]) == 13 and report["settings"]["form"] == "text"


def test_tool_reports_a_bad_path_in_one_line(tmp_path):
    tool = ROOT / "tools" / "evaluate.py"
    command = [sys.executable, tool, "--model", tmp_path / "absent", "--out", tmp_path / "out", "--prose", "p.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and re.fullmatch(r"error: model folder .* not found.*\n", done.stderr), done.stderr


def test_side_by_side_with_yarn_a_control_and_questions(tmp_path, folder, prose, tokenizer):
    make_model(tokenizer, initializer_range=0.3).save_pretrained(tmp_path / "control")
    tokenizer.save_pretrained(tmp_path / "control")
    choices = write_lines(tmp_path / "sums.jsonl", [{"question": "1 + 1?", "options": ["2", "3"], "answer": 0}] * 2)
    short = write_lines(tmp_path / "short.jsonl", [{"question": "1 + 1?", "answers": ["2"]}])
    settings = Settings(
        suites=("perplexity", "choice", "answers"), context=256, ppl_tokens=400, teacher_yarn=4.0, questions=1, shots=0
    )
    sides = {"teacher_dir": folder, "control_dir": tmp_path / "control"}
    files = {"prose": prose, "choice": [choices], "answers": [short]}
    report = evaluate(folder, **sides, **files, out_dir=tmp_path / "out", settings=settings)
    roles = ("teacher", "teacher_yarn", "control", "model")
    loss = {role: report[role]["perplexity"]["prose"]["loss"] for role in roles}
    assert loss["teacher"] == loss["model"] and len(set(loss.values())) == 3
    assert report["teacher_yarn"]["yarn"] == 4.0 and "needle" not in report["model"]
    compared = report["compared_with"]
    assert compared["teacher"]["perplexity_prose"] == {"ratio": 1.0, "low": 1.0, "high": 1.0}
    control = compared["control"]["perplexity_prose"]
    assert control["low"] <= control["ratio"] <= control["high"]
    assert control["ratio"] == pytest.approx(math.exp(loss["model"] - loss["control"]))
    assert report["model"]["choice"]["sums"]["letters"]["samples"] == 1 and "short" in report["model"]["answers"]
    text = (tmp_path / "out" / "evaluation.md").read_text()
    assert "|  | teacher | teacher with YaRN | control | model | model / teacher | model / control |" in text
    assert "| name | tiny | tiny, YaRN × 4 | control | tiny |  |  |" in text
    assert "| sums, written (chance 50 %) |" in text and "| short, exact match | 0 % (0/1; 0–79) |" in text
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert page.count("data:image/png") == 1 and "teacher with YaRN" in page and str(tmp_path) not in page


def test_questions_are_measured_without_being_named(tmp_path, folder):
    short = write_lines(tmp_path / "short.jsonl", [{"question": "1 + 1?", "answers": ["2"]}])
    model = evaluate(folder, answers=[short], settings=Settings(shots=0, context=256))["model"]
    assert model["answers"]["short"]["accuracy"] == 0 and "perplexity" not in model


def test_yarn_is_what_transformers_computes(folder):
    device, dtype = hf_models.resolve_device("cpu"), torch.float32
    plain = hf_models.load(folder, device, dtype).model.config
    model = hf_models.load(folder, device, dtype, yarn=8.0).model
    rope = model.config.rope_parameters
    assert (rope["rope_type"], rope["factor"], rope["original_max_position_embeddings"]) == ("yarn", 8.0, 2048)
    assert rope["rope_theta"] == plain.rope_parameters["rope_theta"]
    assert model.config.max_position_embeddings == 8 * plain.max_position_embeddings
    frequencies = model.model.rotary_emb.inv_freq
    unchanged = plain.rope_parameters["rope_theta"] ** -(torch.arange(0, 8, 2) / 8)
    assert frequencies[0] == pytest.approx(unchanged[0]) and frequencies[-1] == pytest.approx(unchanged[-1] / 8)


def test_every_suite_of_an_oracle_is_at_100(tmp_path, folder, prose, monkeypatch):
    """The suites find their tasks and files, and the table has their rows; only the answers are not the model's."""

    def oracle(prompts):
        return ((index, f" {', '.join(prompt.references)}\n") for index, prompt in enumerate(prompts))

    monkeypatch.setattr(suites, "answerer", lambda *_: oracle)
    choices = write_lines(tmp_path / "sums.jsonl", [{"question": "1 + 1?", "options": ["2", "3"], "answer": "2"}])
    short = write_lines(tmp_path / "short.jsonl", [{"question": "1 + 1?", "answers": ["2"]}])
    settings = Settings(
        suites=("needle", "choice", "answers", "ruler"), needle_lengths=(450,), needle_samples=1, needle_depths=1,
        ruler_lengths=(1500, 3000), ruler_samples=1, teacher_needle_limit=1600, shots=0,
    )  # fmt: skip
    report = evaluate(
        folder, teacher_dir=folder, out_dir=tmp_path / "out", prose=prose, choice=[choices], answers=[short],
        settings=settings,
    )  # fmt: skip
    text = (tmp_path / "out" / "evaluation.md").read_text()
    for row in ("needle, 450 tokens", "sums, written (chance 50 %)", "short, exact match"):
        assert f"| {row} | 100 % (1/1; 21–100) | 100 % (1/1; 21–100) | +0.0 points |" in text
    scores = "100 % (13/13; 77–100) | 100 % (13/13; 77–100) | +0.0 points (-22.8 to +22.8)"
    assert f"| RULER, mean of 13, 1,500 tokens | {scores} |" in text
    page = (tmp_path / "out" / "evaluation.html").read_text()
    assert '<td data-column="model / teacher">+0.0 points (-22.8 to +22.8)</td>' in page
    mean = report["differences"]["teacher"]["RULER, mean of 13, 1,500 tokens"]
    assert mean["low"] == pytest.approx(-mean["high"]) == pytest.approx(-0.228, abs=1e-3)
    assert {key: mean[key] for key in ("difference", "better", "worse", "samples")} == {
        "difference": 0, "better": 0, "worse": 0, "samples": 13
    }  # fmt: skip
    assert "| RULER, mean of 13, 3,000 tokens | not run | 100 % (13/13; 77–100) |  |" in text
    assert len(report["model"]["ruler"]["tasks"]) == 13
