"""Time training steps of a published recipe's stage, by the trainer itself, without weights and text.

    python tools/bench/train_step.py --recipe llama1b --stage distill-64k --teacher-shape llama8b --random
    python tools/bench/train_step.py ... --random --cp 2 --peer one --profile      two GPUs beside one, with kernels
    python tools/bench/train_step.py --recipe llama1b --stage ild --random --toy   a small model, for a CPU

``--random`` makes student and teacher on the device. Without it, ``--student`` and ``--teacher`` are checkpoints of
these shapes. Tokens are made up. Nothing is saved. A step has one micro-batch a rank, or one for each
pipeline stage (``--micro-batches``).

Prints tokens/s, the share of the devices' rate of products (attention counted, recomputed layers not), the floor
(the step at that rate), peak memory, and the ratio to a peer. ``--profile`` adds the time of each group of kernels on
each rank. Writes a JSON file and a picture to ``--out``. Under torchrun all of its ranks take part; otherwise the
program starts TP x PP x CP x DP processes.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import ParallelLayout
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.engine.product_rate import measured_rate
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.plots import COLOURS, new_figure
from hylo_megatron.files import write_json
from hylo_megatron.flags import Parser, command_line, count, size
from hylo_megatron.json_file import read_json
from hylo_megatron.packages import version_of
from hylo_megatron.planner.flops import TokenFlops, token_flops
from hylo_megatron.recipes.proxy import toy_recipe, toy_shape
from hylo_megatron.recipes.shapes import RECIPES, SHAPES, recipe_named, shape, stage_named, student_shape
from hylo_megatron.recipes.stage import Stage
from hylo_megatron.run.launch import Processes, start_own
from hylo_megatron.run.training_process import TrainingProcess
from hylo_megatron.run.world import World, under_torchrun

UNTIMED = 3  # first steps, in which kernels are compiled and a CUDA graph is captured
TOY_LENGTH = 64
PACKAGES = ("torch", "triton", "megatron-core", "flash-linear-attention", "transformer-engine")


@dataclass(frozen=True, kw_only=True)
class Job:
    """What is measured: a stage with the sizes of this run, and both models."""

    name: str
    stage: Stage
    student: Architecture
    teacher: Architecture
    models: list  # flags of the trainer that say where the models come from

    def flops(self) -> TokenFlops:
        stage = self.stage
        taught = min(stage.seq_length, stage.teacher_length or stage.seq_length)
        return token_flops(self.student, self.teacher, stage_kind(stage.kind), train=stage.train,
                           length=stage.seq_length, taught=taught)  # fmt: skip


def job_of(options: argparse.Namespace, folder: Path) -> Job:
    recipe = recipe_named(options.recipe, options.plan, options.linear)
    stage, base = stage_named(recipe, options.stage), shape(options.recipe)
    teacher = shape(options.teacher_shape) if options.teacher_shape else base
    if stage_kind(stage.kind).layerwise and teacher != base:
        raise HyLoError(f"--teacher-shape {options.teacher_shape}: {stage.name} compares with the base model; omit it")
    if options.toy:
        recipe, base, teacher = toy_recipe(recipe), toy_shape(base), toy_shape(teacher)
        stage = replace(stage, seq_length=TOY_LENGTH, micro_batch=1)
    changes = {name: getattr(options, name) for name in ("seq_length", "micro_batch", "recompute")}
    stage = replace(stage, **{name: value for name, value in changes.items() if value is not None})
    student, paths = student_shape(recipe, base), {"student": options.student, "teacher": options.teacher}
    if options.random:
        for role, arch in (("student", student), ("teacher", teacher)):
            paths[role] = folder / role
            paths[role].mkdir()
            arch.save(paths[role])
    student, teacher = (Architecture.load(path) for path in paths.values())
    models = ["--hylo-student", paths["student"], "--hylo-teacher", paths["teacher"], "--mock-data"]
    name = "-".join([options.recipe, stage.name, f"{stage.seq_length // 1024}K" if options.seq_length else ""]).strip(
        "-"
    )
    return Job(name=f"toy-{name}" if options.toy else name, stage=stage, student=student, teacher=teacher,
               models=[*models, "--hylo-random-weights"] if options.random else models)  # fmt: skip


def step_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def measured(job: Job, processes: Processes, options: argparse.Namespace, folder: Path, start) -> dict:
    """Train ``--steps`` steps and return what they took."""
    folder.mkdir()
    batch = job.stage.micro_batch * processes.dp * (options.micro_batches or processes.layout.pp)
    stage = replace(job.stage, steps=options.steps + UNTIMED + 3 * options.profile, global_batch=batch, warmup=0.0)
    log, profile = folder / "train_log.jsonl", folder / "profile"
    flags = [*stage.flags(), *job.models, "--hylo-log", log, "--seed", 1, *options.flag]
    flags += ["--sequence-parallel"] if processes.layout.sequence_parallel else []
    flags += ["--hylo-profile", profile] if options.profile else []
    began, seen = time.time(), []
    try:
        training = TrainingProcess(stage, flags, folder, processes, folder / "log", start)
        training.wait(lambda: seen.append(time.time()))
    except HyLoError as error:
        print((folder / "log").read_text(errors="replace")[-4000:], file=sys.stderr)
        raise HyLoError(f"{job.name}, {processes}: {error}") from None
    lines = step_lines(log)
    seconds = statistics.median(line["seconds"] for line in lines[UNTIMED : UNTIMED + options.steps])
    tokens = batch * stage.seq_length
    return {
        "layout": str(processes), "devices": processes.ranks, "tokens": tokens, "seconds": seconds,
        "tokens_per_second": tokens / seconds, "memory_gib": lines[-1]["memory_gib"],
        "first_step_seconds": round(seen[0] - began, 1) if seen else None,
        "losses": [line["loss"] for line in lines[:3]],
        "profile": [read_json(path) for path in sorted(profile.glob("rank-*.json"))],
    }  # fmt: skip


def with_rate(found: dict, flops: TokenFlops, rate: float) -> dict:
    """Add how the step compares with the devices' rate of products."""
    per_device = found["tokens_per_second"] * flops.total / found["devices"]
    floor = found["tokens"] * flops.total / rate / found["devices"]
    return found | {"flops_per_second": per_device, "utilization": per_device / rate, "floor_seconds": floor}


def compared(options: argparse.Namespace, processes: Processes, measure) -> list[dict]:
    """Return the measurement and, before it, that of its peer."""
    if options.peer and options.peer != "one":
        return [read_json(Path(options.peer))["runs"][-1], measure(processes)]
    return [*([measure(Processes(cuda_graph=processes.cuda_graph))] if options.peer else []), measure(processes)]


def described(found: dict) -> str:
    lines = [f"{found['layout']}: {found['tokens']:,} tokens in {found['seconds'] * 1e3:,.1f} ms,"
             f" {found['tokens_per_second']:,.0f} tokens/s, {found['utilization']:.0%} of the rate of products"
             f" (floor {found['floor_seconds'] * 1e3:,.1f} ms), peak {found['memory_gib']} GiB,"
             f" first step after {found['first_step_seconds']} s, its loss {found['losses'][0]:.6g}"]  # fmt: skip
    for rank in found["profile"]:
        lines.append(f"  rank {rank['rank']}: a step of {rank['step_ms']:,.1f} ms, {rank['idle_ms']:,.1f} ms idle,"
                     f" {rank['exposed_communication_ms']:,.1f} ms of communication alone")  # fmt: skip
        lines += [f"    {group:24}{ms:10,.2f} ms" for group, ms in rank["groups"].items()]
    return "\n".join(lines)


def draw(result: dict, path: Path) -> None:
    """Draw a bar for each run, of its groups of kernels or of its time alone, and the floor as a line."""
    figure = new_figure(7.0, 2.0 + 0.7 * len(result["runs"]))
    axes = figure.subplots()
    labels = []
    for row, run in enumerate(result["runs"]):
        parts = run["profile"][0] if run["profile"] else {"groups": {"step": run["seconds"] * 1e3}, "idle_ms": 0.0}
        parts, left = parts["groups"] | {"no kernel": parts["idle_ms"]}, 0.0
        for group, ms in parts.items():
            labels += [] if group in labels else [group]
            colour = COLOURS[labels.index(group) % len(COLOURS)]
            shade = 1.0 - 0.45 * (labels.index(group) // len(COLOURS))
            axes.barh(row, ms, left=left, color=colour, alpha=shade, label=group)
            left += ms
        axes.plot([run["floor_seconds"] * 1e3] * 2, [row - 0.4, row + 0.4], color="black", label="floor")
    axes.set_yticks(range(len(result["runs"])), [run["layout"] for run in result["runs"]])
    axes.set_xlabel(f"ms of a step, {result['device']}")
    axes.set_title(result["name"], fontsize=10)
    handles = dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", fontsize=7, ncols=5)
    figure.savefig(path, dpi=150)


def report(job: Job, runs: list[dict], options: argparse.Namespace) -> None:
    """Print and write what was measured."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rate, flops = measured_rate(device), job.flops()
    runs = [with_rate(run, flops, rate) for run in runs]
    card = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    result = {
        "name": job.name, "command": " ".join(["python", *sys.argv]), "device": card, "product_rate": rate,
        "versions": {name: version_of(name) for name in PACKAGES}, "student": job.student.plan.name,
        "sequence": job.stage.seq_length, "micro_batch": job.stage.micro_batch, "recompute": job.stage.recompute,
        "flops_per_token": vars(flops) | {"total": flops.total}, "runs": runs,
    }  # fmt: skip
    print(f"{job.name}: {flops.total / 1e9:.2f} GFLOP a token; {card}, products at {rate / 1e12:.1f} TFLOP/s")
    print("\n".join(map(described, runs)))
    if len(runs) > 1:
        result["ratio"] = runs[-1]["tokens_per_second"] / runs[0]["tokens_per_second"]
        print(f"{result['ratio']:.2f} times the tokens/s of {runs[0]['layout']}")
    path = options.out / f"train_step-{job.name}-{runs[-1]['layout'].replace(' ', '')}.json"
    write_json(path, result)
    draw(result, path.with_suffix(".png"))
    print(f"{path} and .png")


def run(options: argparse.Namespace, world: World | None) -> None:
    sizes = {name: getattr(options, name) for name in ("tp", "pp", "cp")}
    layout = ParallelLayout(**sizes, sequence_parallel=options.tp > 1)
    ranks = world.size if world else layout.ranks * options.dp
    graph = options.recipe == "smollm2" if options.cuda_graph is None else options.cuda_graph
    processes = Processes.among(ranks, "ranks", layout, graph)
    if world and options.peer == "one":
        raise HyLoError("--peer one: under torchrun every run has all ranks; start the program without torchrun")
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out if world else None) as folder:  # which all nodes share
        job = job_of(options, Path(folder))

        def measure(among: Processes) -> dict:
            where = Path(folder) / str(among).replace(" ", "")
            return measured(job, among, options, where, world.start if world else start_own)

        report(job, compared(options, processes, measure), options)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--recipe", required=True, choices=RECIPES)
    add("--stage", required=True, help="name of a stage of the recipe, such as ild or distill-8k")
    add("--teacher-shape", choices=tuple(SHAPES), help="another teacher than the base model")
    add("--random", action="store_true", help="random weights, made on the device")
    add("--student", type=Path, help="checkpoint in place of random weights")
    add("--teacher", type=Path, help="checkpoint in place of random weights")
    add("--plan", help="another plan of layers than the recipe's")
    add("--linear", help="another kind of linear blocks than the recipe's")
    for flag in ("--tp", "--pp", "--cp", "--dp"):
        add(flag, type=size, default=1)
    add("--seq-length", type=size, help="(default: the stage's)")
    add("--micro-batch", type=size, help="sequences of a micro-batch (default: the stage's)")
    add("--micro-batches", type=size, help="micro-batches of a rank in a step (default: one for each pipeline stage)")
    add("--recompute", type=count, help="recomputed sub-layers (default: the stage's)")
    add("--steps", type=size, default=5, help="timed steps")
    add("--profile", action="store_true", help="record kernels of two more steps")
    graph = "run a step on one GPU as one CUDA graph (default: as the recipe's script, for SmolLM2 only)"
    add("--cuda-graph", action=argparse.BooleanOptionalAction, help=graph)
    add("--peer", help="'one': the same on one GPU, run first; or the JSON file of an earlier run")
    add("--flag", action="append", default=[], help="another flag of the trainer, as --flag=--hylo-kl-chunk=1024")
    add("--toy", action="store_true", help="small models and short sequences, to try the program on a CPU")
    add("--out", type=Path, default=Path("docs/benchmarks"))
    options = parser.parse_args(argv)
    if options.random == bool(options.student and options.teacher) or options.random == bool(options.student):
        raise HyLoError("give --random, or both --student and --teacher")
    return options


@command_line
def main(argv: list[str] | None = None) -> None:
    options = parsed(argv)
    world = World() if under_torchrun() else None
    if world and world.rank:
        world.follow()
    elif world:
        with world.leading():
            run(options, world)
    else:
        run(options, None)


if __name__ == "__main__":
    main()
