"""Time training steps of a published recipe's stage, by the trainer itself, without weights and text.

    python tools/bench/train_step.py --recipe llama1b --stage distill-64k --teacher-shape llama8b --random
    python tools/bench/train_step.py ... --random --cp 2 --peer one --profile      two GPUs beside one, with kernels
    python tools/bench/train_step.py ... --random --peer transformers --peer-batch largest    beside transformers
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
import sys
import tempfile
from pathlib import Path

from bench_run import processes_ended
from measured_step import (
    PACKAGES,
    Job,
    add_job_flags,
    cause,
    check_job_flags,
    graph_of,
    job_of,
    measured,
    with_rate,
)
from timing import card, this_device

from hylo_megatron.config.layout import ParallelLayout
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.engine.product_rate import measured_rate
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.plots import COLOURS, new_figure
from hylo_megatron.files import write_json
from hylo_megatron.flags import Parser, command_line, size
from hylo_megatron.json_file import read_json
from hylo_megatron.packages import version_of
from hylo_megatron.run.launch import Process, Processes, child_environment, start_own
from hylo_megatron.run.world import World, under_torchrun

TRANSFORMERS = "transformers"


def transformers_step(job: Job, options: argparse.Namespace, folder: Path) -> dict:
    """Return what the step takes in transformers, whole logits and torch's optimizer: ``transformers_step.py``."""
    stage = job.stage
    flags = [*(("--rope", json.dumps(stage.rope)) if stage.rope else ()),
             *(("--teacher-rope", json.dumps(stage.teacher_rope)) if stage.teacher_rope else ()),
             *(("--random",) if job.random else ())]  # fmt: skip
    flags += ["--student", job.folders["student"], "--teacher", job.folders["teacher"], "--steps", options.steps,
              "--seq-length", stage.seq_length, "--batch", options.peer_batch or stage.micro_batch,
              "--checkpointing" if options.peer_checkpointing else "--no-checkpointing"]  # fmt: skip
    log, program = folder / "transformers.log", str(Path(__file__).with_name("transformers_step.py"))
    with processes_ended():
        process = Process(["-W", "ignore", program, *map(str, flags)], log, child_environment(1))
        code = process.popen.wait()
    text = log.read_text(errors="replace")
    if code:
        raise HyLoError(f"{job.name}, transformers: {cause(text) or text.strip().splitlines()[-1][:300]}")
    return json.loads(text.splitlines()[-1])


def earlier_run(path: Path, job: Job) -> dict:
    """Return the last run of an earlier call's file as it was. Raises ``HyLoError`` if it has another step."""
    found, flops = read_json(path), vars(job.flops())
    here = {"name": job.name} | {name: flops[name] for name in ("teacher_products", "teacher_mixing")}
    there = {"name": found["name"]} | {name: found["flops_per_token"][name] for name in here if name != "name"}
    for name, value in here.items():
        if there[name] != value:
            raise HyLoError(f"--peer {path}: {name} is {there[name]}, this step has {value}; give a file of this step")
    run = found["runs"][-1]
    return run | {"layout": f"{run['layout']}, {found['student']} on {found['device']}, earlier"}


def compared(options: argparse.Namespace, processes: Processes, job: Job, measure, peer) -> list[dict]:
    """Return the measurement and, before it, that of its peer; ``peer`` measures transformers."""
    if options.peer == TRANSFORMERS:
        return [peer(), measure(processes)]
    if options.peer and options.peer != "one":
        return [earlier_run(Path(options.peer), job), measure(processes)]
    return [*([measure(Processes(cuda_graph=processes.cuda_graph))] if options.peer else []), measure(processes)]


def check_peer(options: argparse.Namespace, job: Job, world: World | None) -> None:
    """Refuse a peer that cannot be measured beside ``job``, and flags of another peer."""
    if world and options.peer in ("one", TRANSFORMERS):
        raise HyLoError(
            f"--peer {options.peer}: under torchrun every run has all ranks; start the program without torchrun"
        )
    if options.peer_batch not in (None, "largest") and not options.peer_batch.isdigit():
        raise HyLoError(f"--peer-batch {options.peer_batch}: expected a number of sequences, or largest")
    if options.peer != TRANSFORMERS:
        if options.peer_batch or not options.peer_checkpointing:
            raise HyLoError("--peer-batch, --no-peer-checkpointing: for --peer transformers; leave them out")
        return
    stage = job.stage
    if stage_kind(stage.kind).layerwise or stage.train != "all" or stage.teacher_length or stage.ce_weight:
        raise HyLoError(
            f"--peer transformers: trains every weight with the KL alone; {stage.name} does not, take distill-8k"
        )


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
    device = this_device()
    rate, flops = measured_rate(device), job.flops()
    runs = [run if "utilization" in run else with_rate(run, flops, rate) for run in runs]
    result = {
        "name": job.name, "command": " ".join(["python", *sys.argv]), "device": card(device), "product_rate": rate,
        "versions": {name: version_of(name) for name in PACKAGES}, "student": job.student.plan.name,
        "sequence": job.stage.seq_length, "micro_batch": job.stage.micro_batch, "recompute": job.stage.recompute,
        "flops_per_token": vars(flops) | {"total": flops.total}, "runs": runs,
    }  # fmt: skip
    print(
        f"{job.name}: {flops.total / 1e9:.2f} GFLOP a token; {result['device']}, products at {rate / 1e12:.1f} TFLOP/s"
    )
    print("\n".join(map(described, runs)))
    if len(runs) > 1:
        result["ratio"] = runs[-1]["tokens_per_second"] / runs[0]["tokens_per_second"]
        print(f"{result['ratio']:.2f} times the tokens/s of {runs[0]['layout']}")
    path = options.out / f"train_step-{job.name}-{runs[-1]['layout'].replace(' ', '')}.json"
    write_json(path, result)
    draw(result, path.with_suffix(".png"))
    print(f"{path} and .png")


def processes_of(options: argparse.Namespace, world: World | None) -> Processes:
    layout = ParallelLayout(tp=options.tp, pp=options.pp, cp=options.cp, sequence_parallel=options.tp > 1)
    ranks = world.size if world else layout.ranks * options.dp
    graph = graph_of(options) if options.cuda_graph is None else options.cuda_graph
    return Processes.among(ranks, "ranks", layout, graph)


def run(options: argparse.Namespace, world: World | None) -> None:
    processes = processes_of(options, world)
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.out if world else None) as folder:  # which all nodes share
        job = job_of(options, Path(folder))
        check_peer(options, job, world)

        def measure(among: Processes) -> dict:
            where = Path(folder) / str(among).replace(" ", "")
            return measured(job, among, options, where, world.start if world else start_own)

        def peer() -> dict:
            return transformers_step(job, options, Path(folder))

        report(job, compared(options, processes, job, measure, peer), options)


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_job_flags(parser)
    add = parser.add_argument
    for flag in ("--tp", "--pp", "--cp", "--dp"):
        add(flag, type=size, default=1)
    add("--profile", action="store_true", help="record kernels of two more steps")
    graph = "run a step as one CUDA graph (default: as the recipe's script, for a whole SmolLM2 on each GPU)"
    add("--cuda-graph", action=argparse.BooleanOptionalAction, help=graph)
    peer = "'one': the same on one GPU, run first; 'transformers': its models, whole logits and torch's optimizer in"
    add("--peer", help=f"{peer} one process, run first; or the JSON file of an earlier run")
    add("--peer-batch", help="sequences of a step of --peer transformers, or 'largest' (default: the micro-batch)")
    add("--peer-checkpointing", action=argparse.BooleanOptionalAction, default=True,
        help="recompute the student's layers in --peer transformers")  # fmt: skip
    options = parser.parse_args(argv)
    check_job_flags(options)
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
