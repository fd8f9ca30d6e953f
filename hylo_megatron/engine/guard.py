"""The guard of a training: what is done about a loss spike, a gradient burst, and a training that has diverged.

``skip`` and ``rollback`` decide between the backward pass and the optimizer's step, on all ranks alike; ``warn`` and
``stop`` decide when the step is logged. Events go to ``events.jsonl`` beside the step log, with the step's samples.
"""

import contextlib
import json
import math
import operator
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.num_microbatches_calculator import get_current_global_batch_size, update_num_microbatches
from megatron.core.rerun_state_machine import EXIT_CODE_RESUME_TO_DISAMBIGUATE

from hylo_megatron.checkpoint import guard_state
from hylo_megatron.checkpoint.diverged import DIVERGED
from hylo_megatron.checkpoint.guard_state import GuardState
from hylo_megatron.checkpoint.iterations import complete_iterations
from hylo_megatron.distill.losses import Loss
from hylo_megatron.distill.samples import shown, step_samples
from hylo_megatron.distill.spikes import Spikes, SpikeSettings, json_number
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_text
from hylo_megatron.options import from_options

REMEDY = "lower --lr or raise the warm-up, look at these samples, or let --hylo-on-spike skip or rollback handle them"


def settings_of(args) -> SpikeSettings:
    return replace(from_options(SpikeSettings, args), action=args.hylo_on_spike)


class Guard:
    """Guard of one rank. ``loss`` is the loss of the training, ``data`` its data set.

    ``saved``: what the guard knew when the checkpoint was saved that the run resumes from. The first rank decides for
    all, and alone knows the losses.
    """

    def __init__(self, args, loss: Loss, data: Any = None, saved: GuardState | None = None):
        self.args, self.data, self.spikes = args, data, Spikes(settings=settings_of(args))
        self.weights = dict(zip(loss.parts, loss.weights, strict=True)) if loss.layerwise else {loss.parts[0]: 1.0}
        save = Path(args.save or ".")
        self.events = (Path(args.hylo_log).parent if args.hylo_log else save) / "events.jsonl"
        self.diverged = save / DIVERGED
        self.writes, self.wrong, self.norm = torch.distributed.get_rank() == 0, None, None
        self.phase: Any = None
        self.loss = {name: repr(value) for name, value in vars(loss).items() if name != "chunk"}  # changes no value
        self.loss["name"] = type(loss).__name__
        if saved is not None and saved["loss"] == self.loss and not self.diverged.exists():
            self.phase = saved["phase"]
            self.spikes.resume(saved)
        if self.writes:
            self.diverged.unlink(missing_ok=True)  # the user has decided to go on

    def state(self) -> GuardState:
        """Return what a run that resumes from this moment has to know."""
        return {**self.spikes.known(), "loss": self.loss, "phase": self.phase}

    # ---- before the optimizer's step ----

    def begin(self, phase: Any) -> None:
        """Start a step. ``phase`` changes where the loss gets other weights."""
        self.first, self.wrong, self.norm = self.args.consumed_train_samples, None, None
        if phase != self.phase:
            self.phase = phase
            self.spikes.restart()

    @contextlib.contextmanager
    def gate(self, optimizer) -> Iterator[list]:
        """Let ``optimizer.step`` leave the weights alone if the step is wrong. The list takes the losses of the step.

        ``warn`` and ``stop`` leave the optimizer as it is.
        """
        if not self.spikes.settings.gates:
            yield []
            return
        names = ("get_grad_norm", "step_with_ready_grads")
        norm_of, update = (getattr(optimizer, name) for name in names)
        losses: list = []

        def get_grad_norm():
            self.norm = norm_of()
            return self.norm

        def step_with_ready_grads():
            self.wrong = self._agreed(losses)
            return update() if self.wrong is None else False

        optimizer.get_grad_norm, optimizer.step_with_ready_grads = get_grad_norm, step_with_ready_grads
        try:
            yield losses
        finally:
            for name in names:
                delattr(optimizer, name)

    def _agreed(self, losses: list) -> str | None:
        """Return what is wrong with the step, the same on all ranks."""
        norm = None if self.norm is None else float(self.norm)
        wrong = [self.spikes.judge(mean_loss(losses, self.weights), norm)]
        torch.distributed.broadcast_object_list(wrong, 0)
        return wrong[0]

    # ---- after it ----

    def after(self, models: list, optimizer, scheduler, home: Path | None = None) -> None:
        """Advance the schedule of a step that was left out, and if asked roll back to a checkpoint of ``home``."""
        if self.wrong is None:
            return
        scheduler.step(increment=get_current_global_batch_size())
        if self.spikes.settings.action == "rollback":
            self.spikes.rollbacks += 1
            restore(self.args, home, models, optimizer, scheduler)

    def report(self, iteration: int, loss: float, norm: float | None, first: int | None = None) -> None:
        """Log the step's events on rank 0. Raises ``HyLoError`` where the training must not go on.

        ``first``: the step's first sample, if another step has begun since.
        """
        begun, self.first = self.first, self.first if first is None else first
        try:
            self._report(iteration, loss, norm)
        finally:
            self.first = begun

    def _report(self, iteration: int, loss: float, norm: float | None) -> None:
        action, wrong = self.spikes.settings.action, self.wrong
        if not self.spikes.settings.gates:
            wrong = self.spikes.judge(loss, norm)
        if burst := self.spikes.burst(norm):
            self._event(iteration, "burst", burst, loss, norm)
        finite = math.isfinite(loss) and (norm is None or math.isfinite(norm))
        if wrong is not None and (action == "stop" or not (finite or self.spikes.settings.gates)):
            self._stop(iteration, wrong, loss, norm)
        if wrong is not None:
            what = {"warn": "spike", "skip": "skipped", "rollback": "rolled back"}[action]
            self._event(iteration, what, wrong, loss, norm)
        if diverged := self.spikes.took(loss, norm, updated=self.wrong is None):
            self._stop(iteration, diverged, loss, norm)

    def failed_check(self, iteration: int, code: int) -> None:
        """End a step whose gradient is not finite by megatron's own check. All ranks call this.

        megatron repeats such a step, and would then exit by ``code`` without saying why.
        """
        again = "also when the step was repeated" if code == EXIT_CODE_RESUME_TO_DISAMBIGUATE else (
            "but not the same when the step was repeated: look for a faulty device")  # fmt: skip
        why = f"the gradient is not finite, {again}"
        if self.writes:
            self._stop(iteration, why, math.nan, None)
        raise HyLoError(f"diverged at step {iteration}: {why}")

    def _event(self, iteration: int, what: str, why: str, loss: float, norm: float | None) -> str:
        known = self.args.dataloader_type == "single" or self.args.dataloader == "dali"  # whose order is the same
        samples = step_samples(self.data if known else None, self.first, get_current_global_batch_size())
        line = {"iteration": iteration, "event": what, "why": why, "loss": json_number(loss)}
        line |= {"grad_norm": json_number(norm), "samples": samples}
        self.events.parent.mkdir(parents=True, exist_ok=True)
        with self.events.open("a") as file:
            file.write(json.dumps(line) + "\n")
        text = f"step {iteration}: {why}; samples {shown(samples)}"
        print(f"warning: {what}, {text}", flush=True)
        return text

    def _stop(self, iteration: int, why: str, loss: float, norm: float | None) -> None:
        text = self._event(iteration, "stopped", why, loss, norm)
        write_text(self.diverged, json.dumps({"iteration": iteration, "why": text}))
        if self.args.save:  # who removes the marker and goes on has a guard that begins anew
            guard_state.forget(Path(self.args.save))
        raise HyLoError(f"diverged at {text}: {REMEDY}")


def mean_loss(micro_batches: list[dict], weights: dict[str, float]) -> float:
    """Return the loss of a step over all ranks' tokens, on every rank; sums over pipeline stages with losses."""
    total = torch.zeros(2, device=torch.cuda.current_device())
    for each in micro_batches:
        parts, counts = zip(*(each[name].view(-1) for name in weights), strict=True)
        total += torch.stack([sum(map(operator.mul, weights.values(), parts)), counts[0]])
    torch.distributed.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    loss = total[0] / total[1].clamp_min(1e-30)
    torch.distributed.all_reduce(loss, group=parallel_state.get_pipeline_model_parallel_group())
    return float(loss)


def restore(args, home: Path | None, models: list, optimizer, scheduler) -> None:
    """Load weights and optimizer of a checkpoint of ``home``: the newest, or until the run has saved the one loaded.

    Data and learning rate go on from where they are.
    """
    from megatron.training import training
    from megatron.training.async_utils import maybe_finalize_async_save

    maybe_finalize_async_save(blocking=True)
    if home is None or not complete_iterations(home):
        raise HyLoError(
            f"--hylo-on-spike rollback: the run has no checkpoint yet to go back to, neither saved in {args.save} nor"
            " loaded with its optimizer; lower --save-interval, or use --hylo-on-spike skip"
        )
    kept = {name: getattr(args, name) for name in (
        "load", "finetune", "no_load_optim", "no_load_rng", "consumed_train_samples", "skipped_train_samples",
        "consumed_valid_samples")}  # fmt: skip
    args.load, args.finetune, args.no_load_optim, args.no_load_rng = str(home), False, False, True
    iteration, *_ = training.load_checkpoint(models, optimizer, None)
    for name, value in kept.items():
        setattr(args, name, value)
    update_num_microbatches(args.consumed_train_samples)  # a batch size may have a schedule
    scheduler.step(increment=0)  # the groups have the checkpoint's learning rates
    if torch.distributed.get_rank() == 0:
        print(f"rolled back to the weights of iteration {iteration}", flush=True)
