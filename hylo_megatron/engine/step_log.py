"""The log of a training: one line of JSON for each step."""

from __future__ import annotations

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state

from hylo_megatron.distill.batches import LEARNT, NO_TOKENS
from hylo_megatron.distill.spikes import json_number
from hylo_megatron.engine.cpu import without_cuda
from hylo_megatron.engine.to_host import ToHost
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_text

if TYPE_CHECKING:
    from hylo_megatron.engine.guard import Guard


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):  # half a line, the last that a crash left
        return math.inf


@dataclass(kw_only=True)
class Noted:
    """A step whose numbers may still be on the GPU. ``first``: its first sample. ``time``: when it was noted."""

    iteration: int
    learning_rate: float
    numbers: ToHost
    guard: Guard | None
    first: int | None
    time: float


def runs_ahead(guard: Guard | None) -> bool:
    """Return whether a step may start before the one before it is logged.

    A guard that decides about the weights waits for the numbers in any case. In a pipeline the last stage sends them
    to the others.
    """
    if without_cuda() or parallel_state.get_pipeline_model_parallel_world_size() > 1:
        return False
    return guard is None or not guard.spikes.settings.gates


class StepLog:
    """Appends one line of JSON for each step: global means of the losses, also per layer in a layerwise stage.

    ``note`` writes the line at once on a CPU. On a GPU it writes the line when the next step has been launched, so
    that the GPU does not wait for the log. ``flush`` writes what was noted.

    With ``product_rate``, the device's FLOP/s of matrix products, a line has ``tflops``, the model FLOPs of a second
    and device, and ``utilization``, their share of that rate (``planner/flops.py`` says what they count).
    """

    def __init__(self, args, models: list, product_rate: float | None = None):
        self.stage, self.models, self.product_rate = args.hylo_stage, models, product_rate
        self.tokens = args.global_batch_size * args.seq_length
        self.flops = self.tokens * models[0].token_flops(args.seq_length).total if product_rate else 0.0
        self.path = Path(args.hylo_log or Path(args.save or ".") / "train_log.jsonl")
        self.writes, self.last = torch.distributed.get_rank() == 0, None
        self.noted: Noted | None = None

    def truncate(self, iteration: int) -> None:
        """Drop lines of steps that an interrupted run took after its last checkpoint: they are taken again."""
        if not self.writes or not self.path.is_file():
            return
        kept = [line for line in self.path.read_bytes().split(b"\n") if _step_of(line) <= iteration]
        write_text(self.path, "".join(line.decode() + "\n" for line in kept))

    def layer_means(self) -> torch.Tensor | None:
        """Return the parts ``[L, P]`` of each layer's loss, means over the step's tokens; None in other stages."""
        settings = self.models[0].settings
        if not settings.kind.layerwise:
            return None
        shape = self.models[0].arch.num_layers, len(settings.loss.weights)
        means = torch.zeros(shape, device=torch.cuda.current_device())
        everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for module in self.models:
            sums, tokens = module.take_layer_sums()
            torch.distributed.all_reduce(sums, group=everyone)
            torch.distributed.all_reduce(tokens, group=everyone)
            means[module.first_layer : module.first_layer + len(sums)] = sums / tokens.clamp_min(NO_TOKENS)
        torch.distributed.all_reduce(means, group=parallel_state.get_pipeline_model_parallel_group())
        return means

    def note(self, losses: dict, iteration: int, learning_rate, grad_norm, guard: Guard | None = None) -> None:
        """Take the numbers of a step, and write the line of the one before. All ranks call this.

        Raises ``HyLoError`` when the training must not go on.
        """
        numbers = ToHost({**losses, "layers": self.layer_means(), "norm": grad_norm})
        step = Noted(iteration=iteration, learning_rate=learning_rate, numbers=numbers, guard=guard,
                     first=guard and guard.first, time=time.time())  # fmt: skip
        self.flush()
        self.noted = step
        if not runs_ahead(guard):
            self.flush()

    def flush(self) -> None:
        """Write the line of the step that was noted, if any. Raises ``HyLoError`` like ``note``."""
        step, self.noted = self.noted, None
        if step is None:
            return
        losses = step.numbers.get()
        layers, norm = losses.pop("layers"), losses.pop("norm")
        self.write(losses, step.iteration, step.learning_rate, norm, step.guard, layers, step.first, step.time)

    def write(self, losses: dict, iteration: int, learning_rate, norm: float | None, guard: Guard | None = None,
              layers: list[list[float]] | None = None, first: int | None = None,
              now: float | None = None) -> None:  # fmt: skip
        """Append the line of a step. ``first``: its first sample. ``now``: its end, if that is not this moment.

        A step that ``guard`` has skipped has no line if its loss is not finite.
        """
        losses = self._of_last_stage(losses)
        if not self.writes:
            return
        learnt = losses.pop(LEARNT)
        if not learnt:
            print(f"warning: no token of step {iteration} is in the loss: all of them are masked", flush=True)
        if layers:  # the loss function of the last stage saw its own layers only
            totals = [sum(column) for column in zip(*layers, strict=True)]
            losses = dict(zip(losses, totals, strict=True))
            loss = sum(
                weight * value for weight, value in zip(self.models[0].settings.loss.weights, totals, strict=True)
            )
            losses = {"loss": loss} | losses
        skipped = guard is not None and guard.wrong is not None
        if guard is not None:
            guard.report(iteration, losses["loss"], norm, first)
        if not math.isfinite(losses["loss"]):
            if skipped:
                return
            raise HyLoError(f"loss {losses['loss']} at step {iteration}: lower --lr, or look at the data around it")
        now = now or time.time()
        line = {"stage": self.stage, "iteration": iteration}
        line |= losses | {LEARNT: learnt, "lr": learning_rate, "grad_norm": json_number(norm)}
        line |= {"tokens": iteration * self.tokens, "seconds": self.last and round(now - self.last, 4)}
        line |= self._speed(line["seconds"])
        line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if skipped:
            line["skipped"] = True
        if layers:
            line["layers"] = [[round(x, 5) for x in layer] for layer in layers]
        self.last = now
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _speed(self, seconds: float | None) -> dict[str, float]:
        if not seconds or not self.product_rate:
            return {}
        rate = self.flops / seconds / torch.distributed.get_world_size()
        return {"tflops": round(rate / 1e12, 2), "utilization": round(rate / self.product_rate, 4)}

    def _of_last_stage(self, losses: dict) -> dict[str, float]:
        """Return the losses, which only the last stage of a pipeline knows, on every stage."""
        values = [losses]
        stages = parallel_state.get_pipeline_model_parallel_group()
        if stages.size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast_object_list(values, last, group=stages)
        return values[0]
