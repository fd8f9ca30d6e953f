"""Measure a recipe's stage on 1, 2, 4, ... GPUs of this host, in the layouts that the planner ranks first.

    python tools/bench/scaling.py --recipe llama3b --stage distill-64k --teacher-shape llama8b --random
    python tools/bench/scaling.py ... --only dp1,cp2dp2,cp4        these layouts
    python tools/bench/scaling.py ... --dry-run                    the rows and what is planned for them; nothing runs
    python tools/bench/scaling.py --recipe llama1b --stage distill-64k --random --toy --gpus 2      on a CPU

Each row is a run of ``train_step.py`` with ``--profile``. The table has tokens/s, the ratio to one GPU and to linear
scaling, utilisation, memory of the fullest rank, bytes that rank 0 sends in a step, and the planner's memory and speed
beside both. A layout that fails, or goes on after ``--limit`` seconds, is a row with the reason. The table is written
to ``--out`` after each row, as Markdown and JSON. Another call, also one beside this on other GPUs, adds its rows to
a table of the same step, models, card, versions and code of this package.

A layout that does not fit the memory as the recipe trains gets what saves memory: layers recomputed in pairs, then the
optimizer, then the teacher in the host's memory. The last column says so; such rows are slower for that.
"""

import argparse
import hashlib
import json
import re
import shlex
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

from bench_run import one_at_a_time, results_before
from measured_step import PACKAGES, Job, add_job_flags, check_job_flags, graph_of, job_of, measured, planned, with_rate
from scaling_table import planned_rate, write_table

import hylo_megatron
from hylo_megatron.config.layout import ParallelLayout, Work, check_parallel_layout
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.distill.memory_check import gpu_bytes
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_json
from hylo_megatron.flags import Parser, command_line, positive, size
from hylo_megatron.json_file import read_json
from hylo_megatron.packages import version_of
from hylo_megatron.planner.layouts import GIB, USABLE, dividing
from hylo_megatron.planner.speed import tokens_per_second
from hylo_megatron.planner.training import PlannedRun, peaks
from hylo_megatron.run.launch import Processes, child_environment

PAIRS = ("--recompute-granularity", "full", "--recompute-method", "uniform", "--recompute-num-layers", "2")
OPTIMIZER, TEACHER = "--hylo-offload-optimizer", "--hylo-offload-teacher"
SAVERS = {  # what saves memory, with the flags of the trainer
    "": (),
    "recompute in pairs": PAIRS,
    "recompute in pairs, optimizer on the host": (*PAIRS, OPTIMIZER),
    "recompute in pairs, optimizer and teacher on the host": (*PAIRS, OPTIMIZER, TEACHER),
}
LAYERWISE_SAVERS = {"": (), "optimizer on the host": (OPTIMIZER,)}
CARD = ("device", "count", "rate")  # what a file of --card has
# In a process of its own: this one must hold no memory of a GPU.
DEVICE = """
import json, torch
from hylo_megatron.engine.product_rate import measured_rate
on_gpu = torch.cuda.is_available()
name = torch.cuda.get_device_name() if on_gpu else "CPU"
print(json.dumps([name, torch.cuda.device_count(), measured_rate(torch.device("cuda" if on_gpu else "cpu"))]))
"""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A layout, what saves memory on it, and what the planner says. ``run``: None if the planner cannot count it."""

    processes: Processes
    saver: str
    flags: tuple[str, ...]
    run: PlannedRun | None
    memory: float  # GiB of the fullest rank
    speed: float

    @property
    def plan(self) -> dict:
        return {"memory_gib": round(self.memory, 2), "tokens_per_second": self.speed} if self.run else {}


def named(text: str, graph: bool | None) -> Processes:
    """Return the layout that a text such as ``cp2dp2`` names. Raises ``HyLoError``."""
    sizes = {name: int(number) for name, number in re.findall(r"(tp|pp|cp|dp)([1-9]\d*)", text)}
    if text != "".join(f"{name}{number}" for name, number in sizes.items()) or not text:
        raise HyLoError(f"--only {text}: expected sizes such as dp1, cp2dp2 or tp2pp2, between commas")
    dp = sizes.pop("dp", 1)
    return Processes(layout=ParallelLayout(**sizes, sequence_parallel=sizes.get("tp", 1) > 1), dp=dp, cuda_graph=graph)


def planned_candidate(job: Job, processes: Processes, options: argparse.Namespace, card: float) -> Candidate:
    """Return the layout with the first saver of memory with which it fits, or with the last one."""
    savers = LAYERWISE_SAVERS if stage_kind(job.stage.kind).layerwise else SAVERS
    for saver, flags in savers.items():
        run = planned(job, processes, options, flags)
        memory = max(peak.total for peak in peaks(run)) / GIB if run else 0.0
        speed = tokens_per_second(run, card) if run else 0.0
        found = Candidate(processes=processes, saver=saver, flags=flags, run=run, memory=memory, speed=speed)
        if memory <= USABLE * options.gpu_memory:
            break
    return found


def ranked(job: Job, gpus: int, options: argparse.Namespace, card: float) -> list[Candidate]:
    """Return the layouts of ``gpus`` GPUs: first those that fit as the recipe trains, then the fastest."""
    work = Work(processes=gpus, seq_length=job.stage.seq_length, micro_batch=job.stage.micro_batch)
    graph = graph_of(options)
    found = [
        planned_candidate(job, Processes(layout=layout, dp=gpus // layout.ranks, cuda_graph=graph), options, card)
        for layout in dividing((job.student, job.teacher), [work], gpus)
    ]
    order = list(SAVERS | LAYERWISE_SAVERS)
    return sorted(found, key=lambda each: (order.index(each.saver), each.memory > USABLE * options.gpu_memory,
                                           -each.speed))  # fmt: skip


def chosen(job: Job, options: argparse.Namespace, card: float) -> list[Candidate]:
    """Return the layouts to measure. Raises ``HyLoError`` for a layout of ``--only`` that the models do not fit."""
    if not options.only:
        numbers = [n for n in (2**power for power in range(12)) if n < options.gpus] + [options.gpus]
        return [each for n in numbers for each in ranked(job, n, options, card)[: options.ranked]][: options.rows]
    found = [named(text, graph_of(options)) for text in options.only.split(",")]
    for processes in found:
        work = Work(processes=processes.ranks, seq_length=job.stage.seq_length, micro_batch=job.stage.micro_batch)
        check_parallel_layout({"student": job.student, "teacher": job.teacher}, processes.layout, work)
        if processes.ranks > options.gpus:
            raise HyLoError(f"--only: {processes} needs {processes.ranks} GPUs, there are {options.gpus}")
    return [planned_candidate(job, each, options, card) for each in found][: options.rows]


def attempt(job: Job, candidate: Candidate, options: argparse.Namespace, folder: Path, rate: float) -> dict:
    """Return the row of a layout, also if it fails."""
    processes = candidate.processes
    row = {"layout": str(processes), "devices": processes.ranks, "how": candidate.saver, "planned": candidate.plan}
    where = folder / str(processes).replace(" ", "")
    try:
        found = measured(job, processes, options, where, more=candidate.flags, limit=options.limit)
    except HyLoError as error:
        reason = str(error).removeprefix(f"{job.name}, {processes}: ")
        return row | {"failed": reason.partition("; see ")[0][:300]}  # its log goes away, the end of it was printed
    found = with_rate(found, job.flops(), rate)
    ranks = found.pop("profile")
    return row | found | {
        "memory_gib": max(rank["memory_gib"] for rank in ranks), "sent": ranks[0]["sent"],
        "exposed_communication_ms": max(rank["exposed_communication_ms"] for rank in ranks),
        "idle_ms": max(rank["idle_ms"] for rank in ranks), "groups": ranks[0]["groups"],
        "profiled_seconds": max(rank["step_ms"] for rank in ranks) / 1e3,
    }  # fmt: skip


def described(candidate: Candidate) -> str:
    plan = f"planned {candidate.memory:.1f} GiB, {candidate.speed:,.0f} tokens/s" if candidate.run else "not planned"
    return f"{candidate.processes}: {plan}" + (f", {candidate.saver}" if candidate.saver else "")


def head_of(job: Job, options: argparse.Namespace, device: str) -> dict:
    """Return what rows of one table have in common."""
    return {
        "name": job.name, "device": device, "versions": {name: version_of(name) for name in PACKAGES},
        "code": fingerprint(Path(hylo_megatron.__file__).parent),
        "student": job.student.plan.name, "teacher": options.teacher_shape or str(options.teacher or "base model"),
        "flops_per_token": job.flops().total, "sequence": job.stage.seq_length, "micro_batch": job.stage.micro_batch,
        "micro_batches": options.micro_batches, "recompute": job.stage.recompute, "flags": options.flag,
    }  # fmt: skip


def fingerprint(package: Path) -> str:
    """Return a hash of the package's sources, which is there without git too, and changes with every edit."""
    found = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        found.update(str(path.relative_to(package)).encode() + b"\0" + path.read_bytes() + b"\0")
    return found.hexdigest()[:12]


def device_here(options: argparse.Namespace) -> tuple[str, int, float]:
    """Return the name of this host's GPU, how many it has, and their rate of products; of its CPU if it has none.

    A file of ``--card`` has them from an earlier call, or is written. Calls beside each other measure once.
    """
    if not options.card:
        return measured_device()
    options.card.parent.mkdir(parents=True, exist_ok=True)
    with one_at_a_time(options.card.parent):
        if not options.card.is_file():
            write_json(options.card, dict(zip(CARD, measured_device(), strict=True)))
        found = read_json(options.card)
    return tuple(found[name] for name in CARD)


def measured_device() -> tuple[str, int, float]:
    command = [sys.executable, "-W", "ignore", "-c", DEVICE]
    done = subprocess.run(command, env=child_environment(1), capture_output=True, text=True)
    if done.returncode:
        raise HyLoError(f"the device does not work: {done.stderr.strip().splitlines()[-1]}")
    return tuple(json.loads(done.stdout.splitlines()[-1]))


def run(options: argparse.Namespace) -> None:
    device, count, rate = device_here(options)
    options.gpus = options.gpus or count or 1
    options.gpu_memory = options.gpu_memory or (gpu_bytes(0) or 80 * GIB) / GIB
    card = planned_rate(device, rate)
    with tempfile.TemporaryDirectory() as folder:
        job = job_of(options, Path(folder))
        path, head = options.out / f"scaling-{job.name}.json", head_of(job, options, device)
        results_before(path, "rows", head)  # refuses another step's table before a row is measured
        candidates = chosen(job, options, card)
        print(f"{job.name}: {device}, products at {rate / 1e12:.1f} TFLOP/s, {options.gpu_memory:.1f} GiB a GPU")
        print("\n".join(map(described, candidates)), flush=True)
        if options.dry_run:
            return
        options.out.mkdir(parents=True, exist_ok=True)
        for candidate in candidates:
            row = attempt(job, candidate, options, Path(folder), rate)
            print(added(path, head, row, job, options, rate), flush=True)
    print(f"{path} and .md")


def added(path: Path, head: dict, row: dict, job: Job, options: argparse.Namespace, rate: float) -> str:
    """Add a row to the table in ``path``, to which another call may add rows of other GPUs; return the Markdown."""
    with one_at_a_time(path.parent):
        rows = [each for each in results_before(path, "rows", head) if each["layout"] != row["layout"]] + [row]
        rows.sort(key=lambda each: each["devices"])
        runs = {each["layout"]: run_of(job, each, options) for each in rows}
        return write_table(path, head | {"product_rate": rate, "command": shlex.join(sys.argv)}, rows, runs)


def run_of(job: Job, row: dict, options: argparse.Namespace) -> PlannedRun | None:
    """Return the planner's run of a measured row, or None for one that tells nothing about the planner's rates."""
    savers = SAVERS | LAYERWISE_SAVERS
    if "failed" in row or "host" in row["how"]:  # the time of the bytes to and from the host is not planned
        return None
    processes = named(row["layout"].replace(" ", "").lower(), False)
    return planned(job, processes, options, savers[row["how"]])


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add_job_flags(parser)
    add = parser.add_argument
    add("--gpus", type=size, help="(default: those of this host)")
    add("--gpu-memory", type=positive, help="GiB of a GPU, for the plan (default: this host's, or 80)")
    add("--card", type=Path, help="file with the card and its rate of products: an earlier call's, or written by this")
    add("--ranked", type=size, default=1, help="layouts for each number of GPUs")
    add("--only", help="these layouts, such as dp1,cp2dp2, in place of the planner's")
    add("--rows", type=size, help="at most so many layouts")
    add("--limit", type=positive, default=300.0, help="seconds of a row, with its start")
    add("--dry-run", action="store_true", help="print the rows and what is planned for them")
    options = parser.parse_args(argv)
    check_job_flags(options)
    options.profile = True
    return options


@command_line
def main(argv: list[str] | None = None) -> None:
    run(parsed(argv))


if __name__ == "__main__":
    main()
