"""The steps of a recipe's stage, measured by the trainer itself: what ``train_step.py`` and ``scaling.py`` share."""

import argparse
import math
import statistics
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

from bench_run import processes_ended, step_lines

from hylo_megatron.config import Architecture
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.distill.command_line import layout_of
from hylo_megatron.distill.first_flags import first_flags
from hylo_megatron.distill.losses import fitting
from hylo_megatron.distill.memory_check import planned_run
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, count, size
from hylo_megatron.json_file import read_json
from hylo_megatron.planner.flops import TokenFlops, token_flops
from hylo_megatron.planner.training import PlannedRun
from hylo_megatron.recipes.proxy import toy_recipe, toy_shape
from hylo_megatron.recipes.shapes import BASE_OF, RECIPES, SHAPES, recipe_named, shape, stage_named, student_shape
from hylo_megatron.recipes.stage import Stage
from hylo_megatron.run.launch import Processes, start_own
from hylo_megatron.run.training_process import GPU_FLAGS, TrainingProcess

UNTIMED = 3  # in the first steps kernels are compiled and a CUDA graph is captured
TOY_LENGTH = 64
PACKAGES = ("torch", "triton", "megatron-core", "flash-linear-attention", "transformer-engine")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is measured: a stage with the sizes of this run, and both models."""

    name: str
    stage: Stage
    student: Architecture
    teacher: Architecture
    folders: dict[str, Path]  # of student and teacher
    random: bool

    @property
    def model_flags(self) -> list:
        """Flags of the trainer that say where the models come from."""
        flags = ["--hylo-student", self.folders["student"], "--hylo-teacher", self.folders["teacher"], "--mock-data"]
        return [*flags, "--hylo-random-weights"] if self.random else flags

    def flops(self) -> TokenFlops:
        stage = self.stage
        taught = min(stage.seq_length, stage.teacher_length or stage.seq_length)
        return token_flops(self.student, self.teacher, stage_kind(stage.kind), train=stage.train,
                           length=stage.seq_length, taught=taught)  # fmt: skip


def add_job_flags(parser: Parser) -> None:
    """Add the flags that say which step is measured, on whatever layout."""
    add = parser.add_argument
    add("--recipe", required=True, choices=RECIPES)
    add("--stage", required=True, help="name of a stage of the recipe, such as ild or distill-8k")
    add("--teacher-shape", choices=tuple(SHAPES), help="another teacher than the base model")
    add("--random", action="store_true", help="random weights, made on the device")
    add("--student", type=Path, help="checkpoint in place of random weights")
    add("--teacher", type=Path, help="checkpoint in place of random weights")
    add("--plan", help="another plan of layers than the recipe's")
    add("--linear", help="another kind of linear blocks than the recipe's")
    add("--seq-length", type=size, help="(default: the stage's)")
    add("--micro-batch", type=size, help="sequences of a micro-batch (default: the stage's)")
    add("--micro-batches", type=size, help="micro-batches of a rank in a step (default: one for each pipeline stage)")
    add("--recompute", type=count, help="recomputed sub-layers (default: the stage's)")
    add("--steps", type=size, default=5, help="timed steps")
    add("--untimed", type=size, default=UNTIMED, help="steps before them; the least is 1, 3 with a CUDA graph")
    add("--flag", action="append", default=[], help="another flag of the trainer, as --flag=--hylo-kl-chunk=1024")
    add("--toy", action="store_true", help="small models and short sequences, to try the program on a CPU")
    add("--out", type=Path, default=Path("docs/benchmarks"))


def check_job_flags(options: argparse.Namespace) -> None:
    if options.random == bool(options.student and options.teacher) or options.random == bool(options.student):
        raise HyLoError("give --random, or both --student and --teacher")


def job_of(options: argparse.Namespace, folder: Path) -> Job:
    recipe = recipe_named(options.recipe, options.plan, options.linear)
    stage, base = stage_named(recipe, options.stage), shape(BASE_OF[options.recipe])
    teacher = shape(options.teacher_shape) if options.teacher_shape else base
    if stage_kind(stage.kind).layerwise and teacher != base:
        raise HyLoError(f"--teacher-shape {options.teacher_shape}: {stage.name} compares with the base model; omit it")
    if options.toy:
        recipe, base, teacher = toy_recipe(recipe), toy_shape(base), toy_shape(teacher)
        stage = replace(stage, seq_length=TOY_LENGTH, micro_batch=1)
    changes = {name: getattr(options, name) for name in ("seq_length", "micro_batch", "recompute")}
    stage = replace(stage, **{name: value for name, value in changes.items() if value is not None})
    folders = {"student": options.student, "teacher": options.teacher}
    if options.random:
        for role, arch in (("student", student_shape(recipe, base)), ("teacher", teacher)):
            folders[role] = folder / role
            folders[role].mkdir()
            arch.save(folders[role])
    student, teacher = (Architecture.load(path) for path in folders.values())
    length = [f"{stage.seq_length // 1024}K"] if options.seq_length else []
    name = "-".join([*(["toy"] if options.toy else []), options.recipe, stage.name, *length])
    return Job(name=name, stage=stage, student=student, teacher=teacher, folders=folders, random=options.random)


def graph_of(options: argparse.Namespace) -> bool | None:
    """Return ``Processes.cuda_graph`` as in the recipe's script: one CUDA graph for a whole SmolLM2 on each GPU."""
    return None if BASE_OF[options.recipe] == "smollm2" else False


def stage_on(job: Job, processes: Processes, options: argparse.Namespace) -> Stage:
    """Return the stage with the batch and the number of steps that are measured on ``processes``."""
    batch = job.stage.micro_batch * processes.dp * (options.micro_batches or processes.layout.pp)
    steps = options.steps + options.untimed + 3 * options.profile
    return replace(job.stage, steps=steps, global_batch=batch, warmup=0.0)


def step_flags(job: Job, processes: Processes, options: argparse.Namespace, more: tuple = ()) -> list[str]:
    """Return the trainer's flags for the stage on ``processes``; ``more`` come after those of the stage."""
    stage = stage_on(job, processes, options)
    parallel = ["--sequence-parallel"] if processes.layout.sequence_parallel else []
    return list(map(str, [*stage.flags(), *job.model_flags, "--seed", 1, *parallel, *more, *options.flag]))


def planned(job: Job, processes: Processes, options: argparse.Namespace, more: tuple = ()) -> PlannedRun | None:
    """Return the step for the planner, as on GPUs; None where the flags recompute in a way that it cannot count."""
    stage = stage_on(job, processes, options)
    known = first_flags([
        *fitting(GPU_FLAGS, stage_kind(stage.kind), stage.loss), *step_flags(job, processes, options, more),
        *processes.layout.flags(),
    ])  # fmt: skip
    layout, work = layout_of(known)
    return planned_run(known, job.student, job.teacher, layout, replace(work, processes=processes.ranks))


def measured(job: Job, processes: Processes, options: argparse.Namespace, folder: Path, start=start_own,
             more: tuple = (), limit: float = math.inf) -> dict:  # fmt: skip
    """Train ``--steps`` steps, in at most ``limit`` seconds with the start, and return what they took.

    Raises ``HyLoError`` if the training fails. Its processes have ended in any case.
    """
    folder.mkdir()
    stage, log, profile = stage_on(job, processes, options), folder / "train_log.jsonl", folder / "profile"
    flags = [*step_flags(job, processes, options, more), "--hylo-log", log]
    flags += ["--hylo-profile", profile] if options.profile else []
    began, seen = time.time(), []
    try:
        with processes_ended():
            training = TrainingProcess(stage, flags, folder, processes, folder / "log", start)
            training.wait(lambda: seen.append(time.time()), limit)
    except HyLoError as error:
        text = (folder / "log").read_text(errors="replace")
        print(text[-4000:], file=sys.stderr)
        raise HyLoError(f"{job.name}, {processes}: {cause(text) or error}") from None
    lines = step_lines(log)
    seconds = statistics.median(line["seconds"] for line in lines[options.untimed : options.untimed + options.steps])
    tokens = stage.global_batch * stage.seq_length
    return {
        "layout": str(processes), "devices": processes.ranks, "tokens": tokens, "seconds": seconds,
        "tokens_per_second": tokens / seconds, "memory_gib": lines[-1]["memory_gib"],
        "first_step_seconds": round(seen[0] - began, 1) if seen else None,
        "losses": [line["loss"] for line in lines[:3]],
        "profile": [read_json(path) for path in sorted(profile.glob("rank-*.json"))],
    }  # fmt: skip


def cause(log: str) -> str | None:
    """Return the line of a failed training's log that says why: a rank without memory, else the first refusal."""
    lines = [line.strip() for line in log.splitlines()]
    memory = (line for line in lines if "out of memory" in line.lower())
    refused = (line.partition("error: ")[2] for line in lines if line.startswith("error: "))
    return next(memory, None) or next(refused, None)


def with_rate(found: dict, flops: TokenFlops, rate: float) -> dict:
    """Add how the step compares with the devices' rate of products."""
    per_device = found["tokens_per_second"] * flops.total / found["devices"]
    floor = found["tokens"] * flops.total / rate / found["devices"]
    return found | {"flops_per_second": per_device, "utilization": per_device / rate, "floor_seconds": floor}
