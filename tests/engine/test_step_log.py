"""The step log: speeds, numbers that are not finite, and the end of an interrupted log."""

import itertools
import json
import math
from argparse import Namespace
from types import SimpleNamespace

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from hylo_megatron.distill.batches import LEARNT  # noqa: E402
from hylo_megatron.engine import step_log  # noqa: E402
from hylo_megatron.engine.step_log import StepLog  # noqa: E402


def lines(folder, product_rate, monkeypatch) -> list[dict]:
    """Return the log of two steps of 4 x 128 tokens in two seconds each, each token with 2 MFLOP."""
    clock = itertools.count(100.0, 2.0)
    monkeypatch.setattr(step_log, "time", SimpleNamespace(time=lambda: next(clock)))
    settings = SimpleNamespace(kind=SimpleNamespace(layerwise=False))
    model = SimpleNamespace(settings=settings, token_flops=lambda length: SimpleNamespace(total=2e6))
    args = SimpleNamespace(
        hylo_stage="distill", global_batch_size=4, seq_length=128, hylo_log=folder / "log", save=None
    )
    log = StepLog(args, [model], product_rate)
    for step in (1, 2):
        log.write({"loss": 1.0, LEARNT: 1.0}, step, 1e-4, 0.5)
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def test_a_step_says_which_share_of_the_products_rate_it_reached(tmp_path, process_groups, monkeypatch):
    first, second = lines(tmp_path, 5e9, monkeypatch)
    assert "utilization" not in first and first["seconds"] is None
    flops = 4 * 128 * 2e6 / 2.0
    assert second["seconds"] == 2.0 and second["utilization"] == pytest.approx(flops / 5e9, abs=1e-3)
    assert second["tflops"] == pytest.approx(flops / 1e12, abs=0.005)


def test_without_a_rate_a_step_says_nothing_about_it(tmp_path, process_groups, monkeypatch):
    assert not {"utilization", "tflops"} & lines(tmp_path, None, monkeypatch)[1].keys()


def test_a_step_that_is_logged_late_has_its_own_time(tmp_path, process_groups, monkeypatch):
    clock = iter([100.0, 103.0, 104.5])
    monkeypatch.setattr(step_log, "runs_ahead", lambda guard: True)  # as on a GPU
    monkeypatch.setattr(step_log, "time", SimpleNamespace(time=lambda: next(clock)))
    settings = SimpleNamespace(kind=SimpleNamespace(layerwise=False))
    args = SimpleNamespace(
        hylo_stage="distill", global_batch_size=1, seq_length=8, hylo_log=tmp_path / "log", save=None
    )
    log = StepLog(args, [SimpleNamespace(settings=settings)])
    for step in (1, 2, 3):
        log.note({"loss": 1.0, LEARNT: 1.0}, step, 1e-4, 0.5)
    log.flush()
    seconds = [json.loads(line)["seconds"] for line in (tmp_path / "log").read_text().splitlines()]
    assert seconds == [None, 3.0, 1.5]


def test_a_skipped_step_with_a_gradient_that_is_not_finite_leaves_a_log_that_can_be_read(tmp_path, process_groups):
    from hylo_megatron.convert.card_records import origin_of
    from hylo_megatron.run.records import read_steps

    args = Namespace(hylo_stage="distill", global_batch_size=4, seq_length=64, hylo_log=None, save=tmp_path)
    model = SimpleNamespace(settings=SimpleNamespace(kind=SimpleNamespace(layerwise=False)))
    guard = SimpleNamespace(wrong="gradient norm", first=0, report=lambda *values: None)
    log = StepLog(args, [model])
    for step, norm in enumerate((math.nan, math.inf, 0.5), 1):
        log.note({"loss": 2.0, "learnt": 9.0}, step, 1e-3, torch.tensor(norm), guard)
    assert [line["grad_norm"] for line in read_steps(log.path)] == ["nan", "inf", 0.5]
    assert origin_of(tmp_path).stages[0].steps == 3


def test_a_log_is_cut_at_line_feeds_alone(tmp_path, process_groups):
    log = StepLog(Namespace(hylo_stage="ild", global_batch_size=4, seq_length=64, hylo_log=None, save=tmp_path), [])
    lines = [json.dumps({"iteration": step, "stage": "a\u2028b"}, ensure_ascii=False) for step in (1, 2, 3)]
    log.path.write_text("\n".join(lines) + '\n{"iteration": 4, "st', encoding="utf-8")
    log.truncate(2)
    assert log.path.read_bytes() == ("\n".join(lines[:2]) + "\n").encode()
