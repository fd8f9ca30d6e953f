"""The benchmarks run, and count what they say they count."""

import json
import re
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.train import torchrun
from helpers.waits import PATIENCE

from hylo_megatron.engine.step_profile import Span, group_of, self_times, summary
from hylo_megatron.errors import HyLoError


def test_kernels_are_counted_without_what_runs_inside_them():
    spans = [
        Span("outer", 0, 100, 0), Span("inner", 10, 30, 0), Span("inner", 50, 10, 0), Span("outer", 100, 5, 0),
        Span("inner", 20, 7, 1),
    ]  # fmt: skip
    assert self_times(spans) == pytest.approx({"outer": 65e-6, "inner": 47e-6})  # milliseconds


def test_a_profile_knows_when_nothing_or_only_communication_runs():
    ms = 1_000_000
    spans = [Span("ampere_gemm", 0, 4 * ms, 7), Span("ncclDevKernel_AllReduce", 3 * ms, 4 * ms, 9)]
    spans += [Span("flash_fwd_kernel", 8 * ms, 2 * ms, 7)]
    found = summary(spans, wall_ms=12.0, steps=2)
    assert found["step_ms"] == 6 and found["busy_ms"] == 4.5 and found["idle_ms"] == 1.5
    assert found["exposed_communication_ms"] == 1.5  # 4 to 7 ms, of two steps
    assert found["groups"] == {"matrix products": 2, "communication": 2, "attention": 1}
    assert len(json.dumps(summary([Span("k" * 500 + str(i), i, 1, 0) for i in range(999)], 1.0, 1))) < 16000


def test_every_group_finds_its_kernels():
    names = {
        "nvjet_sm90_tst_192x192": "matrix products", "cudnn_sdpa_flash_fprop": "attention",
        "convolve_backward_silu": "projection, convolved", "chunk_gated_delta_rule_fwd_kernel_h": "linear recurrence",
        "layer_norm_gated_bwd_kernel": "gated norm, SwiGLU", "vectorized_layer_norm_kernel": "norms",
        "direct_copy_kernel_cuda": "copies", "multi_tensor_apply_kernel": "optimizer", "gradient": "KL",
        "ncclDevKernel_SendRecv(ncclDevKernelArgsStorage)": "communication",
    }  # fmt: skip
    for name, group in names.items():
        assert group_of(name) == group, name


def bench(program: str, *flags) -> subprocess.CompletedProcess:
    command = [sys.executable, "-W", "ignore", str(ROOT / "tools" / "bench" / program), *map(str, flags)]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)


def test_a_training_step_is_measured_by_the_trainer(tmp_path):
    result = bench("train_step.py", "--recipe", "llama1b", "--stage", "distill-64k", "--teacher-shape", "llama8b",
                   "--random", "--toy", "--steps", 1, "--profile", "--out", tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "train_step-toy-llama1b-distill-64k-TP1PP1DP1.json").read_text())
    assert found["student"] == "4MLA12GDN" and found["recompute"] == 32
    [run] = found["runs"]
    assert run["tokens_per_second"] == pytest.approx(64 / run["seconds"])
    rate = run["flops_per_second"] / found["product_rate"]
    assert run["utilization"] == pytest.approx(rate) == pytest.approx(run["floor_seconds"] / run["seconds"])
    [rank] = run["profile"]
    assert {"matrix products", "attention", "linear recurrence"} <= rank["groups"].keys()
    assert f"{run['tokens_per_second']:,.0f} tokens/s" in result.stdout and "idle" in result.stdout
    assert not list(tmp_path.glob("*iter*")) and (tmp_path / f"{found_name(tmp_path)}.png").stat().st_size > 1000


def found_name(folder) -> str:
    return next(folder.glob("*.json")).stem


@pytest.mark.parallel
def test_two_ranks_are_compared_with_one(tmp_path):
    result = bench("train_step.py", "--recipe", "llama1b", "--stage", "ild", "--random", "--toy", "--steps", 1,
                   "--cp", 2, "--peer", "one", "--out", tmp_path)  # fmt: skip
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / f"{found_name(tmp_path)}.json").read_text())
    assert [run["devices"] for run in found["runs"]] == [1, 2]
    assert found["runs"][0]["losses"] == pytest.approx(found["runs"][1]["losses"], rel=1e-2)  # the same models
    assert found["ratio"] == found["runs"][1]["tokens_per_second"] / found["runs"][0]["tokens_per_second"]


@pytest.mark.parametrize("flags, words", [
    (("--stage", "distill-64k"), "give --random, or both --student and --teacher"),
    (("--stage", "distill-32k", "--random"), "the recipe llama1b has ild, distill-2k, distill-8k, distill-64k"),
    (("--stage", "ild", "--random", "--teacher-shape", "llama8b"), "ild compares with the base model"),
    (("--stage", "ild", "--random", "--peer", "transformers"), "trains every weight with the KL alone; ild does not"),
    (("--stage", "distill-8k", "--random", "--peer-batch", "2"), "for --peer transformers; leave them out"),
    (("--stage", "distill-8k", "--random", "--peer", "transformers", "--peer-batch", "all"), "or largest"),
])  # fmt: skip
def test_a_step_that_cannot_be_measured_is_refused(flags, words, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    import train_step

    with pytest.raises(HyLoError, match=re.escape(words)):
        options = train_step.parsed(["--recipe", "llama1b", *flags])
        train_step.check_peer(options, train_step.job_of(options, tmp_path), None)


def test_an_earlier_run_keeps_its_figures_and_has_the_same_step(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    import train_step

    jobs = []
    for teacher in ("llama1b", "llama8b"):
        (tmp_path / teacher).mkdir()
        flags = ["--recipe", "llama1b", "--stage", "distill-8k", "--random", "--teacher-shape", teacher]
        jobs.append(train_step.job_of(train_step.parsed(flags), tmp_path / teacher))
    run = {"layout": "TP 1 PP 1 DP 1", "tokens_per_second": 100.0, "utilization": 0.5}
    found = {"name": jobs[0].name, "flops_per_token": vars(jobs[0].flops()), "student": "4MLA12GDN", "device": "H100"}
    path = tmp_path / "earlier.json"
    path.write_text(json.dumps(found | {"runs": [run]}))
    earlier = train_step.earlier_run(path, jobs[0])
    assert earlier == run | {"layout": "TP 1 PP 1 DP 1, 4MLA12GDN on H100, earlier"}
    with pytest.raises(HyLoError, match="earlier.json: teacher_products is .*; give a file of this step"):
        train_step.earlier_run(path, jobs[1])


def test_the_losses_are_compared(tmp_path):
    result = bench(
        "kl_loss.py", "--tokens", 64, "--vocabulary", 301, "--student", 16, "--teacher", 24, "--out", tmp_path
    )
    assert result.returncode == 0, result.stderr[-2000:]
    found = json.loads((tmp_path / "kl_loss-64x301.json").read_text())
    assert list(found["results"]) == [*(f"ours, chunk {n}" for n in (4096, 2048, 1024)), "torch, whole logits"]
    for each in found["results"].values():
        assert each["loss"] == pytest.approx(found["results"]["torch, whole logits"]["loss"], rel=1e-4)
    assert (tmp_path / "kl_loss-64x301.png").stat().st_size > 1000
    assert "fla: needs a GPU" in result.stdout and "ours is faster by" in result.stdout


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
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    import attention_ranks

    monkeypatch.setattr(attention_ranks.dist, "get_world_size", lambda: 1)
    monkeypatch.setattr(attention_ranks.dist, "all_gather_object", lambda found, error: found.__setitem__(0, error))
    report = attention_ranks.Report()
    report.parity("right", 1e-6, 1e-5)
    assert not report.wrong
    report.parity("wrong", 1e-4, 1e-5)
    report.parity("lost", float("nan"), 1e-5)
    assert [line.split(":")[0] for line in report.wrong] == ["wrong", "lost"]
