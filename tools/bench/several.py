"""Run benchmark commands on the GPUs of one host, as many at once as there are GPUs for.

    python tools/bench/several.py docs/benchmarks.md                     the commands of that page
    python tools/bench/several.py docs/benchmarks.md --match llama1b --match kl_loss --minutes 20
    python tools/bench/several.py build/lines.txt --dry-run              a file of command lines; says what would run

Commands are the lines that start with ``python``, ``torchrun`` or ``PYTHONPATH=``. The number of GPUs of each follows
from its flags. Each layout of ``--only`` of ``scaling.py`` is a run of its own; their rows meet in one table. Runs
start in order, and one that has to wait for GPUs holds up none that fits: those on all GPUs come last. Tables of
``scaling.py``, and for each other run a folder, go to ``--out`` with a log of each run; kernels to its folder
``kernels``, unless HYLO_KERNEL_CACHE names another. A run that takes longer than ``--limit`` seconds is ended. Lines
with ``--toy`` are for a CPU: of a page they are left out.
"""

import argparse
import functools
import os
import shlex
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from bench_run import GONE_SECONDS

from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line, positive, size
from hylo_megatron.parent import bind_child

STARTS = ("python ", "torchrun ", "PYTHONPATH=")
WRITING = ("train_step.py", "kl_loss.py")  # into a folder of their own, because two lines may have one file's name
POLL_SECONDS = 0.2


@dataclass
class Run:
    name: str
    words: list[str]
    gpus: int
    on: list[int] = field(default_factory=list)
    popen: subprocess.Popen | None = None
    began: float = 0.0


def value_of(words: list[str], flag: str, default: str) -> str:
    """Return a flag's value, given as two words or as one."""
    joined = [word.partition("=")[2] for word in words if word.startswith(f"{flag}=")]
    return joined[-1] if joined else words[words.index(flag) + 1] if flag in words else default


def gpus_of(words: list[str]) -> int:
    """Return the number of GPUs of a command. One that names none takes one."""
    program = program_of(words)
    if "torchrun" in words:
        return int(value_of(words, "--nproc-per-node", "1"))
    if program == "train_step.py":
        ranks = 1
        for flag in ("--tp", "--pp", "--cp", "--dp"):
            ranks *= int(value_of(words, flag, "1"))
        return ranks
    if program == "parallel_gpu.py":
        return max([int(word) for word in words if word in ("2", "4")] or [2])
    return int(value_of(words, "--ranks", "1"))


def program_of(words: list[str]) -> str:
    return next((Path(word).name for word in words if word.endswith(".py")), words[0])


def runs_of(line: str, out: Path, gpus: int) -> list[Run]:
    """Return the runs of a command line on a host of ``gpus`` GPUs."""
    words = shlex.split(line, comments=True)
    program = program_of(words)
    parts = Path(program).stem, value_of(words, "--recipe", ""), value_of(words, "--stage", "")
    name = "-".join(filter(None, parts))
    if program != "scaling.py":
        return [Run(name, words, gpus_of(words))]
    words += ["--out", str(out), "--card", str(out / "card.json"), "--gpus", str(gpus)]
    if "--only" not in words:
        return [Run(name, words, gpus)]
    from scaling import named

    at = words.index("--only")
    return [
        Run(f"{name}-{layout}", [*words[: at + 1], layout, *words[at + 2 :]], named(layout, None).ranks)
        for layout in words[at + 1].split(",")
    ]


def planned(options: argparse.Namespace) -> list[Run]:
    """Return the runs of the file, with names of their own. Raises ``HyLoError`` if there are none."""
    lines = [line.strip() for line in options.file.read_text().splitlines() if line.strip().startswith(STARTS)]
    lines = [line for line in lines if not options.match or any(word in line for word in options.match)]
    if options.file.suffix == ".md":
        lines = [line for line in lines if "--toy" not in line and Path(__file__).name not in line]
    found = [run for line in lines for run in runs_of(line, options.out, options.gpus) if run.gpus <= options.gpus]
    if not found:
        raise HyLoError(f"{options.file}: no command for {options.gpus} GPUs; see --match and --gpus")
    for number, run in enumerate(found):
        run.name = f"{number:02}-{run.name}"
        if program_of(run.words) in WRITING:
            run.words += ["--out", str(options.out / run.name)]
    return found


def start(run: Run, idle: list[int], options: argparse.Namespace) -> None:
    run.on, run.began = idle[: run.gpus], time.monotonic()
    environment = os.environ | {"CUDA_VISIBLE_DEVICES": ",".join(map(str, run.on))}
    environment.setdefault("HYLO_KERNEL_CACHE", str(options.out.resolve() / "kernels"))
    words = [sys.executable if word == "python" else word for word in run.words]
    with (options.out / f"{run.name}.log").open("w") as log:
        run.popen = subprocess.Popen(["env", *words], stdout=log, stderr=log, env=environment, start_new_session=True,
                                     preexec_fn=functools.partial(bind_child, os.getpid()))  # fmt: skip
    print(f"{run.name}: on {environment['CUDA_VISIBLE_DEVICES']}", flush=True)


def end(run: Run) -> None:
    """End a run's processes: first as Ctrl-C does, so that the program ends those that it has started."""
    for number in (signal.SIGINT, signal.SIGKILL):
        with suppress(ProcessLookupError):
            os.killpg(run.popen.pid, number)
        with suppress(subprocess.TimeoutExpired):
            run.popen.wait(GONE_SECONDS)
            return


def all_of(runs: list[Run], options: argparse.Namespace) -> list[str]:
    """Run everything and return the names of what failed or found no time."""
    pending, running, wrong = list(runs), [], []
    last = time.monotonic() + 60 * options.minutes
    try:
        while pending or running:
            for run in list(running):
                late = time.monotonic() - run.began > options.limit
                if late:
                    end(run)
                if run.popen.poll() is not None:
                    running.remove(run)
                    took = f"{time.monotonic() - run.began:.0f} s"
                    print(f"{run.name}: {'ended at the limit of' if late else f'{run.popen.returncode} after'} {took}",
                          flush=True)  # fmt: skip
                    wrong += [run.name] if late or run.popen.returncode else []
            if time.monotonic() > last:
                wrong += [run.name for run in pending]
                pending.clear()
            for run in list(pending):
                idle = [gpu for gpu in range(options.gpus) if not any(gpu in other.on for other in running)]
                if run.gpus <= len(idle):
                    pending.remove(run)
                    start(run, idle, options)
                    running.append(run)
            time.sleep(POLL_SECONDS)
    finally:
        for run in running:
            end(run)
    return wrong


def gpus_here() -> int:
    """Ask in a process of its own: this one must hold no memory of a GPU."""
    count = "import torch; print(torch.cuda.device_count())"
    return int(subprocess.run([sys.executable, "-c", count], capture_output=True, text=True, check=True).stdout)


def run(options: argparse.Namespace) -> None:
    options.gpus = options.gpus or gpus_here() or 1
    runs = planned(options)
    if options.dry_run:
        print("\n".join(f"{run.name}: {run.gpus} of {options.gpus} GPUs: {shlex.join(run.words)}" for run in runs))
        return
    options.out.mkdir(parents=True, exist_ok=True)
    if wrong := all_of(runs, options):
        raise HyLoError(f"failed or not started: {', '.join(wrong)}; see the logs in {options.out}")


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("file", type=Path, help="a page or a file with command lines")
    add("--match", action="append", default=[], help="only lines with this text; may be given several times")
    add("--gpus", type=size, help="(default: those of this host)")
    add("--out", type=Path, default=Path("build/several"))
    add("--minutes", type=positive, default=600.0, help="no run starts later")
    add("--limit", type=positive, default=600.0, help="seconds of a run")
    add("--dry-run", action="store_true", help="print the runs and their GPUs")
    return parser.parse_args(argv)


@command_line
def main(argv: list[str] | None = None) -> None:
    run(parsed(argv))


if __name__ == "__main__":
    main()
