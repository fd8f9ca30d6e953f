"""The places where training reaches into ``megatron.training``: parameter groups, schedule, a log line each step."""

import json
import math
import os
import time
from pathlib import Path

import torch
from megatron.core import parallel_state
from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training import training

from hylo_megatron.config.decisions import is_new
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.distill.batches import LEARNT, NO_TOKENS
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers import FAST_SUFFIXES, FP32_SUFFIXES
from hylo_megatron.parallel.teacher_fed import TeacherFed


def _is_decay(name: str) -> bool:
    return name.endswith(FAST_SUFFIXES)


def _is_other_fp32(name: str) -> bool:
    return name.endswith(FP32_SUFFIXES) and not _is_decay(name)


def learning_rate_groups(args) -> dict:
    """Return parameter groups: copied weights learn slowly, decay parameters, which start far from their end, fast.

    The fp32 parameters (decay, and others such as the skip connection of Mamba-2) always get groups of their own: in
    one with bf16 parameters the distributed optimizer mixes up their order, and the checkpoint cannot be saved
    (``distrib_optimizer.py:1353``).
    """
    groups = {}

    def add(label, matches, factor):
        key = ParamKey(with_name_predicate=ParamWithNamePredicate(label, lambda _, name: matches(name)))
        groups[key] = {"max_lr": args.lr * factor, "min_lr": (args.min_lr or 0.0) * factor}

    if args.hylo_copied_lr_mult != 1.0:
        add("hylo_copied", lambda name: not is_new(name), args.hylo_copied_lr_mult)
    add("hylo_decay", _is_decay, args.hylo_decay_lr_mult)
    add("hylo_skip", _is_other_fp32, 1.0)
    return groups


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["iteration"]
    except (ValueError, KeyError, TypeError):  # half a line, the last that a crash left
        return math.inf


class StepLog:
    """Appends one JSON line a step: global means of the losses, per layer for ``ild``, on every layout."""

    def __init__(self, args, model):
        self.stage, self.model, self.tokens = args.hylo_stage, model, args.global_batch_size * args.seq_length
        self.ild_weights = (args.hylo_ild_attention_weight, args.hylo_ild_hidden_weight)
        self.path = Path(args.hylo_log or Path(args.save or ".") / "train_log.jsonl")
        self.writes, self.last = torch.distributed.get_rank() == 0, None

    def truncate(self, iteration: int) -> None:
        """Drops lines of steps that an interrupted run took after its last checkpoint; they are taken again."""
        if not self.writes or not self.path.is_file():
            return
        kept = [line for line in self.path.read_text(errors="replace").splitlines() if _step_of(line) <= iteration]
        scratch = self.path.with_name(self.path.name + ".partial")
        scratch.write_text("".join(line + "\n" for line in kept))
        os.replace(scratch, self.path)

    def layer_means(self) -> list[list[float]] | None:
        if not stage_kind(self.stage).layerwise:
            return None
        means = torch.zeros(self.model[0].arch.num_layers, 2, device=torch.cuda.current_device())
        everyone = parallel_state.get_data_parallel_group(with_context_parallel=True)
        for module in self.model:
            sums, tokens = module.take_layer_sums()
            torch.distributed.all_reduce(sums, group=everyone)
            torch.distributed.all_reduce(tokens, group=everyone)
            means[module.first_layer : module.first_layer + len(sums)] = sums / tokens.clamp_min(NO_TOKENS)
        torch.distributed.all_reduce(means, group=parallel_state.get_pipeline_model_parallel_group())
        return means.tolist()

    def write(self, losses: dict, iteration: int, learning_rate, grad_norm) -> None:
        layers = self.layer_means()
        values = [{key: float(value) for key, value in losses.items()}]
        stages = parallel_state.get_pipeline_model_parallel_group()
        if stages.size() > 1:
            last = parallel_state.get_pipeline_model_parallel_last_rank()
            torch.distributed.broadcast_object_list(values, last, group=stages)
        if not self.writes:
            return
        losses, now = values[0], time.time()
        learnt = losses.pop(LEARNT)
        if not learnt:
            print(f"warning: no token of step {iteration} is in the loss: all of them are masked", flush=True)
        if layers:  # the loss function of the last stage saw its own layers only
            totals = [sum(column) for column in zip(*layers, strict=True)]
            losses = dict(zip(losses, totals, strict=True))
            loss = sum(weight * value for weight, value in zip(self.ild_weights, totals, strict=True))
            losses = {"loss": loss} | losses
        if not math.isfinite(losses["loss"]):
            raise HyLoError(f"loss {losses['loss']} at step {iteration}: lower --lr, or look at the data around it")
        line = {"stage": self.stage, "iteration": iteration}
        line |= losses | {LEARNT: learnt, "lr": learning_rate, "grad_norm": grad_norm and float(grad_norm)}
        line |= {"tokens": iteration * self.tokens, "seconds": self.last and round(now - self.last, 4)}
        line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        if layers:
            line["layers"] = [[round(x, 5) for x in layer] for layer in layers]
        self.last = now
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a") as file:
            file.write(json.dumps(line) + "\n")


def install(models: list) -> None:
    """Called once; ``models`` is filled by the model provider before the first step."""
    configured, logged = training.get_megatron_optimizer_config, training.training_log
    log: list[StepLog] = []

    def with_groups(args):
        config, overrides = configured(args)
        return config, {**overrides, **learning_rate_groups(args)}

    def with_step_log(loss_dict, total, learning_rate, iteration, scale, report, skipped, grad_norm, *rest, **kwargs):
        if not log:
            log.append(StepLog(training.get_args(), models))
            log[0].truncate(iteration - 1)
        log[0].write(loss_dict, iteration, learning_rate, grad_norm)
        return logged(loss_dict, total, learning_rate, iteration, scale, report, skipped, grad_norm, *rest, **kwargs)

    args = training.get_args()
    teacher_fed = stage_kind(args.hylo_stage).layerwise and args.pipeline_model_parallel_size > 1
    schedule = TeacherFed()  # training and evaluation ask for it apart, and share it
    training.get_forward_backward_func = (lambda **_: schedule) if teacher_fed else get_forward_backward_func
    training.get_megatron_optimizer_config = with_groups
    training.training_log = with_step_log
