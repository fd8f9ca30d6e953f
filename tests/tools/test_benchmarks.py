"""The benchmarks run, and count what they say they count."""

import gzip
import importlib.util
import json
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.train import torchrun
from helpers.waits import PATIENCE


@pytest.fixture
def train_step(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path])  # the file puts the repository's root first
    spec = importlib.util.spec_from_file_location("train_step", ROOT / "tools" / "bench" / "train_step.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def event(name: str, start: float, length: float, lane: int = 0, kind: str = "kernel") -> dict:
    return {"ph": "X", "name": name, "ts": start, "dur": length, "pid": 0, "tid": lane, "cat": kind}


def test_kernels_are_counted_without_what_runs_inside_them(train_step, tmp_path, monkeypatch):
    events = [
        event("outer", 0, 100), event("inner", 10, 30), event("inner", 50, 10), event("outer", 100, 5),
        event("inner", 20, 7, lane=1), event("python", 0, 1000, kind="user_annotation"),
    ]  # fmt: skip
    with gzip.open(tmp_path / "trace.gz", "wt") as file:
        json.dump({"traceEvents": events}, file)
    monkeypatch.setattr(train_step, "PROFILED", 1)  # steps that the trace has
    times, calls = train_step.read_trace(tmp_path / "trace.gz")
    assert times == pytest.approx({"outer": 0.065, "inner": 0.047})  # milliseconds
    assert calls == {"outer": 2, "inner": 3}


def test_every_group_finds_its_kernels(train_step):
    names = {
        "nvjet_sm90_tst_192x192": "matrix products", "cudnn_sdpa_flash_fprop": "attention",
        "convolve_backward_silu": "projection, convolved", "chunk_gated_delta_rule_fwd_kernel_h": "linear recurrence",
        "layer_norm_gated_bwd_kernel": "gated norm, SwiGLU", "vectorized_layer_norm_kernel": "norms",
        "direct_copy_kernel_cuda": "copies", "multi_tensor_apply_kernel": "optimizer", "gradient": "KL",
    }  # fmt: skip
    for name, group in names.items():
        assert train_step.grouped({name: 1.0}) == {group: 1.0}, name


def test_kernel_benchmark_runs():
    command = [sys.executable, str(ROOT / "tools" / "bench" / "mixer_kernels.py"), "--tokens", "64", "--length", "32"]
    result = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert result.returncode == 0, result.stderr[-2000:]
    for name in ("gated delta rule", "state-space scan", "projection, convolved", "rotary", "hidden-state KL"):
        assert name in result.stdout


def test_attention_across_ranks_is_compared_with_one_process():
    run = torchrun(ROOT / "tools" / "bench" / "attention_ranks.py", "--parts", "teacher", "mla", processes=2)
    assert run.returncode == 0, run.stderr[-2000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert lines[-1]["verdict"] == "right"
    compared = {(line["part"], line["what"]) for line in lines if "error" in line or "errors" in line}
    assert {("teacher", "2 ranks, p2p"), ("teacher", "2 ranks, auto"), ("mla", "2 ranks, auto")} <= compared


def test_a_wrong_attention_is_said(monkeypatch):
    spec = importlib.util.spec_from_file_location("ranks", ROOT / "tools" / "bench" / "attention_ranks.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "ranks", module)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(module.dist, "all_gather_object", lambda found, error: found.__setitem__(0, error))
    report = module.Report()
    report.parity("right", 1e-6, 1e-5)
    assert not report.wrong
    report.parity("wrong", 1e-4, 1e-5)
    report.parity("lost", float("nan"), 1e-5)
    assert [line.split(":")[0] for line in report.wrong] == ["wrong", "lost"]
