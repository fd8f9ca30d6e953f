"""The speed in the step log."""

import json
from types import SimpleNamespace

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from hylo_megatron.distill.batches import LEARNT  # noqa: E402
from hylo_megatron.engine import step_log  # noqa: E402
from hylo_megatron.engine.step_log import StepLog  # noqa: E402


def lines(folder, product_rate) -> list[dict]:
    """Return the log of two steps of 4 x 128 tokens, each token with 2 MFLOP."""
    settings = SimpleNamespace(kind=SimpleNamespace(layerwise=False))
    model = SimpleNamespace(settings=settings, token_flops=lambda length: SimpleNamespace(total=2e6))
    args = SimpleNamespace(
        hylo_stage="distill", global_batch_size=4, seq_length=128, hylo_log=folder / "log", save=None
    )
    log = StepLog(args, [model], product_rate)
    for step in (1, 2):
        log.write({"loss": 1.0, LEARNT: 1.0}, step, 1e-4, 0.5)
        log.last -= 2.0  # as if the step took two seconds more
    return [json.loads(line) for line in (folder / "log").read_text().splitlines()]


def test_a_step_says_which_share_of_the_products_rate_it_reached(tmp_path, process_groups):
    first, second = lines(tmp_path, product_rate=5e9)
    assert "utilization" not in first and first["seconds"] is None
    flops = 4 * 128 * 2e6 / second["seconds"]
    assert second["utilization"] == pytest.approx(flops / 5e9, abs=1e-3) and 0.08 < second["utilization"] < 0.11
    assert second["tflops"] == pytest.approx(flops / 1e12, abs=0.005)


def test_without_a_rate_a_step_says_nothing_about_it(tmp_path, process_groups):
    assert not {"utilization", "tflops"} & lines(tmp_path, product_rate=None)[1].keys()


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
