"""Whole evaluations: files, comparisons, and what is refused."""

import json
import re
import subprocess
import sys

import pytest
from helpers.evaluation import (
    make_model,
    write_lines,
)
from helpers.paths import ROOT
from helpers.waits import PATIENCE

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import Settings, evaluate
from hylo_megatron.evaluate import models as hf_models
from hylo_megatron.evaluate.plots import read_log, running_mean
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
    assert "| needle, 450 tokens | 0 % (0/2; 0–66) | 0 % (0/2; 0–66) | +0.0 points |" in text
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


def test_cache_of_a_hybrid_counts_mla_rows():
    config = HyLoConfig(mixers=["gdn", "mla", "gdn", "gdn", "mla"], kv_lora_rank=256, qk_rope_head_dim=64)
    assert hf_models.kv_bytes_per_token(config) == 2 * 2 * (256 + 64)


def test_log_of_a_resumed_run(tmp_path):
    records = [{"stage": "kl", "iteration": i, "loss": loss} for i, loss in ((1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0))]
    assert read_log(write_lines(tmp_path / "log.jsonl", records)) == {"kl": [(1, 3.0), (2, 2.0), (3, 1.0)]}
    assert running_mean([4.0, 2.0, 6.0, 1.0], 2) == [4.0, 4.0, 3.0, 3.5]


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
        ("device 'abacus'", folder, {"settings": Settings(device="abacus")}),
        ("dtype 'int3'", folder, {"settings": Settings(dtype="int3")}),
    ):
        with pytest.raises(HyLoError, match=message):
            evaluate(model, **options)
    for wrong in (
        {"context": 0}, {"long_documents": 0}, {"needle_lengths": ()}, {"skip": ("all",)}, {"batch_size": 0},
        {"teacher_needle_limit": 512},
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


def test_tool_reports_a_bad_path_in_one_line(tmp_path):
    tool = ROOT / "tools" / "evaluate.py"
    command = [sys.executable, tool, "--model", tmp_path / "absent", "--out", tmp_path / "out", "--prose", "p.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and re.fullmatch(r"error: model folder .* not found.*\n", done.stderr), done.stderr
