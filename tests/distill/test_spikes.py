"""Each guard fired on purpose: loss spikes, values that are not finite, gradient bursts, trainings that diverge."""

import json
import math
import shutil
from argparse import Namespace
from collections import Counter
from types import SimpleNamespace

import pytest
import torch

from hylo_megatron.checkpoint import guard_state
from hylo_megatron.distill.spikes import LEAST, ROLLBACKS, SKIPS, WINDOW, Spikes, SpikeSettings
from hylo_megatron.errors import HyLoError
from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402

from hylo_megatron.checkpoint.folder import CheckpointReader  # noqa: E402

# ---- decisions ----


def steady(steps: int, **settings) -> Spikes:
    spikes = Spikes(settings=SpikeSettings(**settings))
    for _ in range(steps):
        assert spikes.judge(2.0, 1.0) is None and spikes.took(2.0, 1.0, updated=True) is None
    return spikes


def test_a_spike_is_far_above_the_median():
    assert steady(LEAST - 1).judge(1000.0, 1.0) is None  # too few to compare with
    assert steady(LEAST).judge(5.9, 1.0) is None
    assert "loss 6.1 is 3.0 times the median 2 of the last 10 steps" in steady(LEAST).judge(6.1, 1.0)
    assert steady(LEAST, factor=4.0).judge(6.1, 1.0) is None
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan)):
        assert steady(0).judge(loss, norm)
    assert steady(LEAST).judge(2.0, None) is None


def test_a_burst_is_of_the_norm():
    assert steady(LEAST).burst(9.9) is None and steady(LEAST).burst(None) is None
    assert "gradient norm 11 is 11.0 times" in steady(LEAST).burst(11.0)


def test_what_counts_as_diverged():
    spikes = steady(WINDOW)
    rise = [spikes.took(6.5, 1.0, updated=True) for _ in range(WINDOW)]
    assert rise[0] is None and "has risen from 2 to 6.5" in rise[-1]
    spikes = steady(WINDOW)
    spikes.restart()  # the loss has other weights: no rise
    assert not any(spikes.took(6.5, 1.0, updated=True) for _ in range(WINDOW))
    spikes = steady(WINDOW)
    skips = [spikes.took(math.nan, 1.0, updated=False) for _ in range(SKIPS)]
    assert skips[-2] is None and f"{SKIPS} steps in a row" in skips[-1]
    spikes = steady(WINDOW)
    spikes.rollbacks = ROLLBACKS
    assert spikes.took(math.nan, 1.0, updated=False) is None
    spikes.rollbacks += 1
    assert "rollbacks did not help" in spikes.took(math.nan, 1.0, updated=False)


def test_a_resumed_run_knows_what_the_interrupted_one_knew(tmp_path):
    first, second = steady(WINDOW - 1), Spikes(settings=SpikeSettings())
    first.took(math.nan, 0.1, updated=False)
    first.rollbacks = 2
    assert first.known()["lowest"] is None  # infinity is no JSON
    for loss in (0.1 + 0.2, 1 / 3):
        first.took(loss, loss, updated=True)
    guard_state.write(tmp_path, 60, first.known() | {"loss": {"name": "KL"}, "phase": [False]})
    second.resume(guard_state.read(tmp_path, 60))
    assert second == first and second.losses.maxlen == WINDOW and len(second.losses) == WINDOW


def test_states_of_the_guard_go_with_their_checkpoints(tmp_path, capsys):
    state = Spikes(settings=SpikeSettings()).known() | {"loss": {}, "phase": []}
    for iteration in (4, 8):
        guard_state.write(tmp_path, iteration, state)
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    (tmp_path / "iter_0000004").rmdir()
    guard_state.write(tmp_path, 12, state)
    assert [path.name for path in sorted((tmp_path / "guard").iterdir())] == [
        "iter_0000008.json", "iter_0000012.json"]  # fmt: skip
    assert guard_state.read(tmp_path, 4) is None and capsys.readouterr().err == ""
    (tmp_path / "guard" / "iter_0000008.json").write_text('{"losses": [1')
    assert guard_state.read(tmp_path, 8) is None
    assert "iter_0000008.json: not valid JSON" in capsys.readouterr().err


def test_factors_are_above_one():
    for name, field in (("spike", "factor"), ("burst", "burst")):
        with pytest.raises(HyLoError, match=f"--hylo-{name}-factor 1.0: expected a number above 1"):
            SpikeSettings(**{field: 1.0})


# ---- trainings ----


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


def test_a_guard_begins_anew_after_a_divergence_and_for_another_loss(tmp_path, process_groups):
    from hylo_megatron.distill.losses import KL
    from hylo_megatron.engine import guard

    args = Namespace(save=tmp_path, hylo_log=None, hylo_on_spike="rollback")

    def resumed(saved: dict | None, loss: KL | None = None) -> guard.Guard:
        return guard.Guard(args, loss or KL(ce_from=0.5, chunk=8), None, saved)

    saved = steady(12).known() | {"loss": resumed(None).loss, "phase": [True]}
    watch = resumed(json.loads(json.dumps(saved)), KL(ce_from=0.5))
    args.consumed_train_samples = 0
    watch.begin([True])
    assert watch.state() == saved
    watch.begin([False])  # other weights of the loss
    assert watch.state() == saved | {"losses": [], "phase": [False]}
    assert not resumed(saved, KL(temperature=2.0)).spikes.norms
    watch.diverged.write_text("{}")
    assert (
        not resumed(saved).spikes.losses and resumed(saved).spikes.losses
    )  # the user goes on, which removes the file


def test_a_guard_begins_anew_when_the_user_has_removed_the_marker(tmp_path, process_groups, monkeypatch):
    """The recipe's runner and the next stage ask for its removal."""
    from hylo_megatron.distill.losses import KL
    from hylo_megatron.engine import guard

    monkeypatch.setattr(guard, "step_samples", lambda *_: [])
    monkeypatch.setattr(guard, "get_current_global_batch_size", lambda: 1)
    args = Namespace(save=tmp_path, hylo_log=None, hylo_on_spike="skip", dataloader_type="cyclic", dataloader=None,
                     consumed_train_samples=0)  # fmt: skip
    watch = guard.Guard(args, KL())
    watch.begin([False])
    guard_state.write(tmp_path, 8, watch.state())
    assert guard_state.read(tmp_path, 8) is not None
    watch.wrong = "loss nan"
    for step in range(1, SKIPS):
        watch.report(step, math.nan, None)
    with pytest.raises(HyLoError, match=f"{SKIPS} steps in a row were skipped"):
        watch.report(SKIPS, math.nan, None)
    watch.diverged.unlink()
    assert guard_state.read(tmp_path, 8) is None


def test_no_rollback_to_a_run_that_gave_its_weights_only(tmp_path, monkeypatch):
    from megatron.training import async_utils

    from hylo_megatron.engine import guard

    monkeypatch.setattr(async_utils, "maybe_finalize_async_save", lambda blocking: None)
    with pytest.raises(HyLoError, match="the run has no checkpoint yet to go back to, neither saved in .* nor loaded"):
        guard.restore(Namespace(save=tmp_path), None, [], None, None)


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


def test_a_rollback_keeps_the_size_of_the_batch(tmp_path, monkeypatch, process_groups):
    """With --step-batch-size-schedule the checkpoint's samples mean a smaller batch."""
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.training import async_utils, training

    from hylo_megatron.engine import guard

    def load(models, optimizer, scheduler):
        args.consumed_train_samples = 0
        calculator.update_num_microbatches(0)
        return 4, 0

    args = Namespace(load=None, save=tmp_path, finetune=False, no_load_optim=False, no_load_rng=False,
                     consumed_train_samples=24, skipped_train_samples=0, consumed_valid_samples=0)  # fmt: skip
    monkeypatch.setattr(async_utils, "maybe_finalize_async_save", lambda blocking: None)
    monkeypatch.setattr(training, "load_checkpoint", load)
    monkeypatch.setattr(guard, "complete_iterations", lambda folder: [folder])
    monkeypatch.setattr(calculator, "_GLOBAL_NUM_MICROBATCHES_CALCULATOR", None)
    calculator.init_num_microbatches_calculator(0, None, 4, 2, 1, step_batch_size_schedule="0:2 16:4")
    assert calculator.get_current_global_batch_size() == 2
    calculator.update_num_microbatches(24)
    guard.restore(args, tmp_path, [], None, SimpleNamespace(step=lambda increment: None))
    assert args.consumed_train_samples == 24 and calculator.get_current_global_batch_size() == 4


def test_a_skipped_step_with_a_gradient_that_is_not_finite_leaves_a_log_that_can_be_read(tmp_path, process_groups):
    from hylo_megatron.convert.card_records import origin_of
    from hylo_megatron.engine.step_log import StepLog
    from hylo_megatron.run.records import read_steps

    args = Namespace(hylo_stage="distill", global_batch_size=4, seq_length=64, hylo_log=None, save=tmp_path)
    model = SimpleNamespace(settings=SimpleNamespace(kind=SimpleNamespace(layerwise=False)))
    guard = SimpleNamespace(wrong="gradient norm", first=0, report=lambda *values: None)
    log = StepLog(args, [model])
    for step, norm in enumerate((math.nan, math.inf, 0.5), 1):
        log.note({"loss": 2.0, "learnt": 9.0}, step, 1e-3, torch.tensor(norm), guard)
    assert [line["grad_norm"] for line in read_steps(log.path)] == ["nan", "inf", 0.5]
    assert origin_of(tmp_path).stages[0].steps == 3


def test_an_event_names_the_samples_of_either_loader(tmp_path, process_groups, monkeypatch):
    from hylo_megatron.distill.losses import KL
    from hylo_megatron.engine import guard
    from hylo_megatron.engine.training_run import TrainingRun
    from hylo_megatron.train import remembered

    data = SimpleNamespace(dataset_path=tmp_path / "text", sequence=lambda index: 10 * index)
    monkeypatch.setattr(guard, "get_current_global_batch_size", lambda: 2)
    for dataloader, kind, loader, known in (
        ("torch", "single", data, True), ("dali", "external", SimpleNamespace(reads=data), True),
        ("torch", "cyclic", data, False),
    ):  # fmt: skip
        run = TrainingRun()
        remembered(lambda loader=loader: [loader, None, None], run)()
        args = Namespace(save=tmp_path, hylo_log=None, hylo_on_spike="warn", dataloader=dataloader,
                         dataloader_type=kind, consumed_train_samples=4)  # fmt: skip
        watch = guard.Guard(args, KL(), run.data)
        watch.begin(None)
        watch._event(3, "spike", "loss", 9.0, 1.0)
        wanted = [[str(tmp_path / "text"), "sequence", number] for number in (40, 50)] if known else []
        assert events(tmp_path)[-1]["samples"] == wanted


def test_a_log_is_cut_at_line_feeds_alone(tmp_path, process_groups):
    from hylo_megatron.engine.step_log import StepLog

    log = StepLog(Namespace(hylo_stage="ild", global_batch_size=4, seq_length=64, hylo_log=None, save=tmp_path), [])
    lines = [json.dumps({"iteration": step, "stage": "a\u2028b"}, ensure_ascii=False) for step in (1, 2, 3)]
    log.path.write_text("\n".join(lines) + '\n{"iteration": 4, "st', encoding="utf-8")
    log.truncate(2)
    assert log.path.read_bytes() == ("\n".join(lines[:2]) + "\n").encode()


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
