"""The guard of a training, without a training: when it begins anew, what it goes back to, and what it notes."""

import json
import math
from argparse import Namespace
from types import SimpleNamespace

import pytest

from hylo_megatron.checkpoint import guard_state
from hylo_megatron.distill.spikes import SKIPS, Spikes, SpikeSettings
from hylo_megatron.errors import HyLoError
from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers.train import read_log  # noqa: E402

from hylo_megatron.distill.losses import KL  # noqa: E402
from hylo_megatron.engine import guard  # noqa: E402


def took(steps: int) -> Spikes:
    spikes = Spikes(settings=SpikeSettings())
    for _ in range(steps):
        spikes.took(2.0, 1.0, updated=True)
    return spikes


def test_a_guard_begins_anew_after_a_divergence_and_for_another_loss(tmp_path, process_groups):
    args = Namespace(save=tmp_path, hylo_log=None, hylo_on_spike="rollback")

    def resumed(saved: dict | None, loss: KL | None = None) -> guard.Guard:
        return guard.Guard(args, loss or KL(ce_from=0.5, chunk=8), None, saved)

    saved = took(12).known() | {"loss": resumed(None).loss, "phase": [True]}
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

    monkeypatch.setattr(async_utils, "maybe_finalize_async_save", lambda blocking: None)
    with pytest.raises(HyLoError, match="the run has no checkpoint yet to go back to, neither saved in .* nor loaded"):
        guard.restore(Namespace(save=tmp_path), None, [], None, None)


def test_a_rollback_keeps_the_size_of_the_batch(tmp_path, monkeypatch, process_groups):
    """With --step-batch-size-schedule the checkpoint's samples mean a smaller batch."""
    from megatron.core import num_microbatches_calculator as calculator
    from megatron.training import async_utils, training

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


def test_an_event_names_the_samples_of_either_loader(tmp_path, process_groups, monkeypatch):
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
        assert read_log(tmp_path / "events.jsonl")[-1]["samples"] == wanted
