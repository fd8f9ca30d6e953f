"""Each guard fired on purpose in a training: loss spikes, values that are not finite, bursts, divergences."""

import json
import math
import shutil
from collections import Counter

import pytest
import torch

from hylo_megatron.checkpoint import guard_state
from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402

from hylo_megatron.checkpoint.folder import CheckpointReader  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.make_world(tmp_path_factory.mktemp("world"))


def run(world, folder, action: str, spoiled: dict, processes: int = 1, stage="distill", **flags):
    flags = dict(train_iters=14, hylo_on_spike=action, lr=1e-4) | flags
    argv = helpers.train_flags(world, stage, folder, **flags)
    return helpers.train(*argv, processes=processes, HYLO_TEST_SPOIL=json.dumps(spoiled))


def events(folder) -> list[dict]:
    return helpers.read_log(folder / "events.jsonl")


def steps(folder) -> list[int]:
    return [line["iteration"] for line in helpers.read_log(folder / "train_log.jsonl")]


def test_a_spike_is_told_with_its_samples(world, tmp_path):
    done = run(world, tmp_path / "run", "warn", {12: 1000.0})
    assert done.returncode == 0, done.stderr[-3000:]
    found = events(tmp_path / "run")
    assert [(line["iteration"], line["event"]) for line in found] == [(12, "burst"), (12, "spike")]
    assert f"warning: spike, step 12: loss {found[1]['loss']:.4g} is " in done.stdout
    for prefix, kind, number in found[1]["samples"]:
        assert (prefix, kind) == (str(world["data"]), "document") and 0 <= number < 60
    assert len(found[1]["samples"]) == 4 and steps(tmp_path / "run") == list(range(1, 15))


@pytest.mark.parametrize("processes, stage, sizes, factor", [
    (1, "distill", {}, 1000.0),
    # The loss of one pipeline stage is about half of all: the factor tells both apart.
    pytest.param(2, "ild", dict(pipeline_model_parallel_size=2), 4.5, marks=pytest.mark.parallel),
], ids=["alone", "ild PP2"])  # fmt: skip
def test_skipped_steps_change_nothing(world, tmp_path, processes, stage, sizes, factor):
    folder = tmp_path / "run"
    done = run(world, folder, "skip", {5: math.nan, 12: factor}, processes, stage, save_interval=4, **sizes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert [(line["iteration"], line["event"]) for line in events(folder) if line["event"] != "burst"] == [
        (5, "skipped"), (12, "skipped")]  # fmt: skip
    assert all(torch.isfinite(tensor).all() for tensor in helpers.trained_weights(folder).values())
    if stage == "ild":  # whose log has the losses of layers, which the test has left alone
        return
    lines = helpers.read_log(folder / "train_log.jsonl")
    assert steps(folder) == [step for step in range(1, 15) if step != 5]  # nan is no JSON
    assert [line["iteration"] for line in lines if line.get("skipped")] == [12]
    plain = tmp_path / "plain"
    assert run(world, plain, "stop", {}).returncode == 0
    rates = {line["iteration"]: line["lr"] for line in helpers.read_log(plain / "train_log.jsonl")}
    assert all(line["lr"] == rates[line["iteration"]] for line in lines)  # the schedule goes on


def test_a_rollback_takes_the_weights_of_the_last_checkpoint(world, tmp_path):
    folder = tmp_path / "run"
    done = run(world, folder, "rollback", {11: math.nan}, train_iters=11, save_interval=4)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert "rolled back to the weights of iteration 8" in done.stdout
    (folder / "latest_checkpointed_iteration.txt").write_text("8")
    before = helpers.trained_weights(folder)
    (folder / "latest_checkpointed_iteration.txt").write_text("11")
    tiny.same_bits(helpers.trained_weights(folder), before)
    assert Counter(line["event"] for line in events(folder))["rolled back"] == 1


def test_a_rollback_before_the_first_save_goes_back_to_what_was_loaded(world, tmp_path):
    """--save holds a newer checkpoint of another run, which no rollback may take."""
    first, second = tmp_path / "first", tmp_path / "second"
    done = run(world, first, "rollback", {}, train_iters=2, save_interval=2, lr_warmup_iters=0)
    assert done.returncode == 0, done.stderr[-3000:]
    shutil.copytree(first, second)
    (second / "iter_0000002").rename(second / "iter_0000009")
    (second / "latest_checkpointed_iteration.txt").write_text("9")
    done = run(world, second, "rollback", {3: math.nan, 5: math.nan}, train_iters=5, save_interval=4, load=first,
               override_opt_param_scheduler=True)  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("rolled back")] == [
        f"rolled back to the weights of iteration {iteration}" for iteration in (2, 4)]  # fmt: skip


def test_a_resumed_run_has_the_medians_of_the_interrupted_one(world, tmp_path):
    """Twelve steps were before the checkpoint, too few after it. A rollback changes no median."""
    whole, resumed = tmp_path / "whole", tmp_path / "resumed"
    flags = dict(train_iters=14, save_interval=12)
    done = run(world, whole, "rollback", {13: 1000.0}, **flags)
    assert done.returncode == 0 and "rolled back to the weights of iteration 12" in done.stdout, done.stderr[-3000:]
    shutil.copytree(whole, resumed, ignore=shutil.ignore_patterns("iter_0000014*", "events.jsonl"))
    (resumed / "latest_checkpointed_iteration.txt").write_text("12")
    done = run(world, resumed, "rollback", {13: 1000.0}, **flags)
    assert done.returncode == 0, done.stderr[-3000:]
    assert events(resumed) == events(whole) != []
    states = [guard_state.read(folder, 14) for folder in (whole, resumed)]
    assert states[0] == states[1] and len(states[0]["losses"]) == 13 and states[0]["rollbacks"] == 1


@pytest.mark.parametrize("schedule", [
    "override_opt_param_scheduler", pytest.param("use_checkpoint_opt_param_scheduler", marks=pytest.mark.slow),
])  # fmt: skip
def test_a_rollback_after_another_schedule(world, tmp_path, schedule):
    """It goes back to the checkpoint that --ckpt-step has loaded, and once there is a newer one to that."""
    folder = tmp_path / "run"
    done = run(world, folder, "rollback", {}, train_iters=4, save_interval=2)
    assert done.returncode == 0, done.stderr[-3000:]
    done = run(world, folder, "rollback", {3: math.nan, 5: math.nan}, train_iters=6, save_interval=4, lr=5e-5,
               ckpt_step=2, **{schedule: True})  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    assert [line for line in done.stdout.splitlines() if line.startswith("rolled back")] == [
        f"rolled back to the weights of iteration {iteration}" for iteration in (2, 4)]  # fmt: skip
    if schedule.startswith("use"):  # the flags' rates are not those of the last checkpoint's groups
        done = run(world, folder, "rollback", {}, train_iters=7, lr=5e-5, **{schedule: True})
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]


@pytest.mark.parallel
def test_a_rollback_needs_a_checkpoint_and_trains_on(world, tmp_path):
    folder = tmp_path / "further"
    done = run(world, tmp_path / "none", "rollback", {2: math.nan})
    assert done.returncode == 2 and "has no checkpoint yet to go back to" in done.stderr
    done = run(world, folder, "rollback", {6: math.nan}, save_interval=4)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    last = [CheckpointReader(folder)["decoder.final_norm.weight"]]
    (folder / "latest_checkpointed_iteration.txt").write_text("8")
    assert not torch.equal(CheckpointReader(folder)["decoder.final_norm.weight"], *last)


DIVERGED = {  # action, and the factors by which losses of some steps are multiplied
    "stop": ("stop", {12: 1000.0}),
    "warn": ("warn", {3: math.nan}),
    "megatron's check": ("warn", {3: math.nan}),
    "skip": ("skip", {step: math.nan for step in range(3, 14)}),
}


@pytest.mark.parametrize("case", [
    case if case == "stop" else pytest.param(case, marks=pytest.mark.parallel) for case in DIVERGED
])  # fmt: skip
def test_a_diverged_training_never_passes_as_done(world, tmp_path, case):
    folder, (action, spoiled) = tmp_path / "run", DIVERGED[case]
    off = {} if case.startswith("megatron") else dict(no_check_for_nan_in_loss_and_grad=True)
    done = run(world, folder, action, spoiled, save_interval=2, **off)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    step = 3 if action == "warn" else 12
    assert f"error: diverged at step {step}: " in line and "lower --lr" in line and str(world["data"]) in line
    assert json.loads((folder / "diverged.json").read_text())["iteration"] == step
    done = helpers.train(*helpers.train_flags(world, "distill", tmp_path / "next", student=folder))
    assert done.returncode == 2 and "its training diverged" in done.stderr
    assert not (folder / "iter_0000014").exists()
