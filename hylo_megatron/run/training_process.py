"""The training process of a stage: its command line and its progress."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from hylo_megatron.config.stages import stage_kind
from hylo_megatron.distill.losses import fitting
from hylo_megatron.errors import HyLoError
from hylo_megatron.recipes.stage import Stage
from hylo_megatron.run.launch import Processes, start_own
from hylo_megatron.run.records import StepLine, step_line

POLL_SECONDS = 0.2
SHOW_SECONDS = 30  # between lines of a log; a terminal's line changes every second


def fast_bf16() -> bool:
    """Return whether bf16 products are faster than fp32 here: on any recent GPU, or a CPU with AVX-512 BF16 or AMX."""
    if torch.cuda.is_available():
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def last_line(log: Path) -> StepLine | None:
    """Return the last complete line of a log that another process may be writing to."""
    lines = log.read_bytes().split(b"\n")[:-1] if log.is_file() else []
    return step_line(lines[-1], f"{log}:{len(lines)}") if lines else None


def _show(stage: Stage, line: dict | None, started: float, terminal: bool) -> None:
    if line is None:
        text = f"      {stage.name}: starting, {time.time() - started:.0f} s"
    else:
        text = f"      {stage.name}: step {line['iteration']}/{stage.steps}, loss {line['loss']:.3f}"
        if line["seconds"]:  # not known of a process's first step
            text += f", {stage.global_batch * stage.seq_length / line['seconds']:.0f} tokens/s"
    print(f"\r{text:<78}" if terminal else text, end="" if terminal else "\n", flush=True)


GPU_FLAGS = ("--num-workers", "2", "--hylo-kl-chunk", "4096")
# Run the step as one CUDA graph: otherwise launching a small model's kernels takes as long as the step itself.
GRAPH_FLAGS = ("--cuda-graph-impl", "full_iteration", "--cuda-graph-warmup-steps", "2",
               "--no-check-for-nan-in-loss-and-grad")  # fmt: skip


def in_one_graph(flags: list, processes: Processes) -> bool:
    """Return whether a step is one CUDA graph. Raises ``HyLoError`` if that was asked for and cannot be."""
    moved = any("--hylo-offload" in str(flag) for flag in flags)  # under a graph tensors must stay in their place
    possible = torch.cuda.is_available() and not moved
    if processes.cuda_graph and not possible:
        raise HyLoError("--cuda-graph: needs a GPU, and works without --hylo-offload-*; leave one of them out")
    return possible and processes.one_graph


class TrainingProcess:
    """The training of a stage. Its processes may start before the student for which they wait exists.

    ``start(arguments, processes, log)`` starts them: ``launch.start_own``, or that of a ``World``. ``flags``
    override those for this machine.
    """

    def __init__(self, stage: Stage, flags: list, save: Path, processes: Processes, log: Path, start=start_own):
        self.stage, self.steps, self.log = stage, save / "train_log.jsonl", log
        own = ["--bf16"] if fast_bf16() else []
        own += fitting(GPU_FLAGS, stage_kind(stage.kind), stage.loss) if torch.cuda.is_available() else ()
        own += GRAPH_FLAGS if in_one_graph(flags, processes) else ()
        trainer = ["-m", "hylo_megatron.train", *own, *map(str, flags), *processes.layout.flags()]
        self.process = start(trainer, processes, log)

    def wait(self, running: Callable[[], object] = lambda: None, limit: float = math.inf) -> None:
        """Wait for the last step and show the progress. ``running`` is called once, after the first step.

        Raises ``HyLoError`` if the training fails, or goes on after ``limit`` seconds.
        """
        terminal, started, shown, told = sys.stdout.isatty(), time.time(), time.time(), False
        before = last_line(self.steps)
        while (code := self.process.poll()) is None:
            time.sleep(POLL_SECONDS)
            line = last_line(self.steps)
            if not told and line != before:
                told = True
                running()
            if time.time() - started > limit:
                raise HyLoError(f"{self.stage.name} went on after {limit:g} s, the time limit; see {self.log}")
            if time.time() - shown > (1 if terminal else SHOW_SECONDS):
                shown = time.time()
                _show(self.stage, None if line == before else line, started, terminal)
        if terminal:
            print("\r" + " " * 78 + "\r", end="", flush=True)
        if code:
            raise HyLoError(
                f"{self.stage.name} stopped ({self.process.reason()}); see {self.log}."
                " The same command continues from the last checkpoint"
            )

    def stop(self) -> None:
        self.process.stop()
