"""Run a published recipe's script under torchrun with random weights: kill a rank, go on, and end on half the ranks.

    python tools/bench/recipe_faults.py --recipe llama3b --teacher-shape llama8b --ranks 8 --layout CP=2 --out runs/x
    python tools/bench/recipe_faults.py --recipe llama3b --ranks 2 --toy --steps 6 --out build/faults      on a CPU

The program makes base model, teacher and text (``random_model.py``), and starts ``torchrun examples/upcycle_NAME.sh``
with ``STEPS`` steps in every stage. When the stage of ``--kill-in`` has written a checkpoint, one rank is killed, and
the same command goes on. When the stage of ``--half-in`` has written a checkpoint, a rank is killed again, and the
command goes on with half the ranks. Checked are: all processes end after a kill, no step is taken twice that a
checkpoint has, every stage reaches its last step, and the last student is exported. A call that is cut goes on when it
is repeated.
"""

import argparse
import functools
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from bench_run import MARK, marked, processes_ended, results_before, step_lines
from random_model import write_model, write_texts

from hylo_megatron.checkpoint.iterations import latest_number, trained_to
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_json
from hylo_megatron.flags import Parser, command_line, size
from hylo_megatron.parent import bind_child
from hylo_megatron.recipes.published import BASES, published
from hylo_megatron.recipes.shapes import SHAPES, shape

ROOT = Path(__file__).resolve().parents[2]
ENDED_SECONDS = 180  # for torchrun and all ranks after a kill
POLL_SECONDS = 0.05


def variables(options: argparse.Namespace, layout: list[str], flags: str) -> dict[str, str]:
    """Return the script's variables. ``layout``: such as ``CP=2``."""
    inputs = options.out / "inputs"
    found = {"OUT": options.out / "run", "STEPS": options.steps, "SAVE_EVERY": options.save_every, "FLAGS": flags}
    if options.toy:
        found["PROXY"] = 1
    else:
        found |= {"HF_MODEL": inputs / "base", "DATA": inputs / "text.jsonl"}
        found |= {"TEACHER": inputs / "teacher"} if options.teacher_shape else {}
    return {name: str(value) for name, value in found.items() if value != ""} | dict(x.split("=") for x in layout)


def make_inputs(options: argparse.Namespace) -> None:
    inputs = options.out / "inputs"
    write_model(shape(options.recipe), inputs / "base")
    if options.teacher_shape:
        write_model(shape(options.teacher_shape), inputs / "teacher")
    write_texts(inputs / "text.jsonl")


class Launch:
    """One torchrun of the script."""

    def __init__(self, options: argparse.Namespace, ranks: int, layout: list[str], flags: str):
        self.folder, self.mark = options.out / "run", os.environ[MARK]
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
        command.append(str(ROOT / "examples" / f"upcycle_{options.recipe}.sh"))
        environment = os.environ | variables(options, layout, flags) | {"PYTHON": sys.executable}
        with (options.out / "output.log").open("a") as output:
            self.popen = subprocess.Popen(command, env=environment, stdout=output, stderr=output,
                                          preexec_fn=functools.partial(bind_child, os.getpid()))  # fmt: skip

    def check(self) -> None:
        if self.popen.poll() is not None:
            raise HyLoError(f"the script ended with {self.popen.returncode}; see {self.folder.parent / 'output.log'}")

    def wait_for(self, what: Callable[[], object]) -> None:
        while not what():
            self.check()
            time.sleep(POLL_SECONDS)

    def finish(self) -> None:
        if self.popen.wait():
            self.check()

    def trainers(self) -> dict[int, int]:
        """Return the training process of each rank: the one that started first, since its workers are forks of it."""
        found: dict[int, tuple[int, int]] = {}
        for number in marked(self.mark):
            try:
                started = int(Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()[19])
                command = Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0")
                values = dict(line.split(b"=", 1) for line in Path(f"/proc/{number}/environ").read_bytes().split(b"\0")
                              if b"=" in line)  # fmt: skip
            except OSError:
                continue
            if b"hylo_megatron.train" in command and b"RANK" in values:
                rank = int(values[b"RANK"])
                found[rank] = min(found.get(rank, (started, number)), (started, number))
        return {rank: number for rank, (_, number) in found.items()}

    def kill_rank(self) -> float:
        """Kill the last rank's training, and return the seconds until no process of the run was left."""
        trainers = self.trainers()
        os.kill(trainers[max(trainers)], signal.SIGKILL)
        began = time.monotonic()
        try:
            self.popen.wait(ENDED_SECONDS)
            while marked(self.mark):
                if time.monotonic() - began > ENDED_SECONDS:
                    raise HyLoError(f"processes {marked(self.mark)} outlive a killed rank by {ENDED_SECONDS} s")
                time.sleep(POLL_SECONDS)
        except subprocess.TimeoutExpired:
            raise HyLoError(f"torchrun goes on {ENDED_SECONDS} s after one of its ranks was killed") from None
        return time.monotonic() - began


def kill_in(stage: str, launch: Launch, options: argparse.Namespace) -> dict:
    """Kill a rank once ``stage`` has a checkpoint, and return what is known of that moment."""
    folder = launch.folder / stage
    launch.wait_for(lambda: latest_number(folder))
    if trained_to(folder, options.steps):
        raise HyLoError(f"{stage} had ended before a rank was killed; give more --steps, and another --out")
    saved = latest_number(folder)
    before = [line for line in step_lines(folder / "train_log.jsonl") if line["iteration"] <= saved]
    seconds = launch.kill_rank()
    print(f"{stage}: a rank killed after the checkpoint of step {saved}; all processes ended in {seconds:.1f} s",
          flush=True)  # fmt: skip
    return {"stage": stage, "saved": saved, "seconds": round(seconds, 1), "lines": before}


def check_resumed(folder: Path, killed: dict, steps: int) -> None:
    """Raise ``HyLoError`` if steps that the checkpoint had were taken again, or others are missing."""
    lines = step_lines(folder / killed["stage"] / "train_log.jsonl")
    if [line["iteration"] for line in lines] != list(range(1, steps + 1)):
        raise HyLoError(f"{killed['stage']}: the log has steps {[line['iteration'] for line in lines]} of {steps}")
    if lines[: len(killed["lines"])] != killed["lines"]:
        raise HyLoError(f"{killed['stage']}: steps before the checkpoint of {killed['saved']} were taken again")


def settings_of(options: argparse.Namespace) -> dict:
    return {name: value for name, value in vars(options).items() if name != "out"}


def run(options: argparse.Namespace) -> None:
    stages = [stage.name for stage in published(options.recipe).stages]
    for name in (options.kill_in, options.half_in):
        if name not in stages:
            raise HyLoError(f"stage {name!r}: the recipe {options.recipe} has {', '.join(stages)}")
    record = options.out / "kills.json"  # what an earlier call, which was cut, has done
    kills = results_before(record, "kills", settings_of(options), "settings")
    options.out.mkdir(parents=True, exist_ok=True)
    began, folder = time.monotonic(), options.out / "run"
    if not options.toy:
        make_inputs(options)
        print(f"base model, teacher and text: {time.monotonic() - began:.0f} s", flush=True)
    whole = (options.ranks, options.layout, options.flags)
    half = (options.ranks // 2, options.half_layout or options.layout, options.half_flags or options.flags)
    for place, stage in enumerate((options.kill_in, options.half_in)):
        if place < len(kills):
            continue
        with processes_ended():
            kills.append(kill_in(stage, Launch(options, *whole), options))
        write_json(record, {"settings": settings_of(options), "kills": kills})
    with processes_ended():
        Launch(options, *half).finish()
    for killed in kills:
        check_resumed(folder, killed, options.steps)
    wrong = [stage for stage in stages if not trained_to(folder / stage, options.steps)]
    if wrong or not (folder / f"hf-{stages[-1]}" / "config.json").is_file():
        raise HyLoError(f"{folder}: {', '.join(wrong) or 'the export'} is not complete")
    print(f"every stage has {options.steps} steps, {stages[-1]} ended on {half[0]} ranks of {options.ranks}, exported:"
          f" {folder / ('hf-' + stages[-1])}; {time.monotonic() - began:.0f} s")  # fmt: skip


def parsed(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--recipe", required=True, choices=tuple(BASES))
    add("--teacher-shape", choices=tuple(SHAPES), help="another teacher than the base model")
    add("--ranks", type=size, required=True, help="processes, one for each GPU")
    add("--steps", type=size, default=3, help="of each stage")
    add("--save-every", type=size, default=2, help="steps between checkpoints")
    add("--layout", nargs="*", default=[], help="variables of the script, such as CP=2")
    add("--flags", default="", help="more flags of the trainer (FLAGS of the script)")
    add("--half-layout", nargs="*", default=[], help="the same on half the ranks (default: --layout)")
    add("--half-flags", default="", help="(default: --flags)")
    add("--kill-in", default="distill-2k", help="stage in which a rank is killed")
    add("--half-in", default="distill-64k", help="stage in which a rank is killed and half the ranks go on")
    add("--toy", action="store_true", help="the recipe at toy size (PROXY=1), on a CPU")
    add("--out", type=Path, required=True)
    options = parser.parse_args(argv)
    if options.ranks % 2:
        raise HyLoError(f"--ranks {options.ranks}: expected an even number, half of which goes on at the end")
    if options.save_every >= options.steps:
        raise HyLoError(f"--save-every {options.save_every}: expected fewer than the {options.steps} of --steps")
    if options.toy and options.teacher_shape:
        raise HyLoError("--teacher-shape: --toy has the base model as its teacher; leave one of them out")
    return options


@command_line
def main(argv: list[str] | None = None) -> None:
    run(parsed(argv))


if __name__ == "__main__":
    main()
