"""The log of a training: one line of JSON for each step."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from megatron.core import parallel_state

from hylo_megatron.distill.batches import LEARNT, NO_TOKENS
from hylo_megatron.distill.spikes import json_number
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_text

if TYPE_CHECKING:
    from hylo_megatron.engine.guard import Guard


def _step_of(line: bytes) -> float:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):  # half a line, the last that a crash left
        return math.inf


class StepLog:
    """Appends one line of JSON for each step: global means of the losses, also per layer in a layerwise stage.

    With ``product_rate``, the device's FLOP/s of matrix products, a line has ``tflops``, the model FLOPs of a second
    and device, and ``utilization``, their share of that rate (``planner/flops.py`` says what they count).
    """

    def __init__(self, args, models: list, product_rate: float | None = None):
        self.stage, self.models, self.product_rate = args.hylo_stage, models, product_rate
        self.tokens = args.global_batch_size * args.seq_length
        self.flops = self.tokens * models[0].token_flops(args.seq_length).total if product_rate else 0.0
        self.path = Path(args.hylo_log or Path(args.save or ".") / "train_log.jsonl")
        self.writes, self.last = torch.distributed.get_rank() == 0, None

    def truncate(self, iteration: int) -> None:
        """Drop lines of steps that an interrupted run took after its last checkpoint: they are taken again."""
        if not self.writes or not self.path.is_file():
            return
        kept = [line for line in self.path.read_bytes().split(b"\n") if _step_of(line) <= iteration]
        write_text(self.path, "".join(line.decode() + "\n" for line in kept))

    def layer_means(self) -> list[list[float]] | None:
        """Return the parts of each layer's loss, averaged over all tokens of the step; None in other stages."""
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
        return means.tolist()

    def write(self, losses: dict, iteration: int, learning_rate, grad_norm, guard: Guard | None = None) -> None:
        """Append the line of a step. All ranks call this. Raises ``HyLoError`` when the training must not go on.

        A step that ``guard`` has skipped has no line if its loss is not finite.
        """
        layers = self.layer_means()
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
        norm = grad_norm and float(grad_norm)
        skipped = guard is not None and guard.wrong is not None
        if guard is not None:
            guard.report(iteration, losses["loss"], norm)
        if not math.isfinite(losses["loss"]):
            if skipped:
                return
            raise HyLoError(f"loss {losses['loss']} at step {iteration}: lower --lr, or look at the data around it")
        now = time.time()
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
        values = [{key: float(value) for key, value in losses.items()}]
        stages = parallel_state.get_pipeline_model_parallel_group()
        if stages.size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast_object_list(values, last, group=stages)
        return values[0]
