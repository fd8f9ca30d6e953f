"""Starts a training run under torchrun and shows how far it is."""

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from hylo_megatron.errors import HyLoError
from hylo_megatron.recipes.stage import Stage

POLL_SECONDS = 0.2


def fast_bf16() -> bool:
    """Whether bf16 products beat fp32 here: any recent GPU, or a CPU with AVX-512 BF16 or AMX."""
    if torch.cuda.is_available():
        return True
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def last_line(log: Path) -> dict | None:
    """Of a log that another process may be writing to at this moment."""
    lines = log.read_text().split("\n")[:-1] if log.is_file() else []
    return json.loads(lines[-1]) if lines else None


def _show(stage: Stage, line: dict | None, started: float, terminal: bool) -> None:
    if line is None:
        text = f"      {stage.name}: starting, {time.time() - started:.0f} s"
    else:
        rate = stage.global_batch * stage.seq_length / (line["seconds"] or math.inf)
        text = (
            f"      {stage.name}: step {line['iteration']}/{stage.steps}, loss {line['loss']:.3f}, {rate:.0f} tokens/s"
        )
    print(f"\r{text:<78}" if terminal else text, end="" if terminal else "\n", flush=True)


@dataclass(frozen=True)
class Layout:
    """How many processes train, and how they share the model. ``dp`` is what the GPUs at hand leave."""

    tp: int
    pp: int
    dp: int
    cuda_graph: bool = True  # of one GPU's training step

    @classmethod
    def found(cls, tp: int, pp: int, cuda_graph: bool = True) -> "Layout":
        gpus = torch.cuda.device_count()
        if gpus and gpus % (tp * pp):
            raise HyLoError(f"TP {tp} x PP {pp} = {tp * pp} ranks do not divide the {gpus} GPUs here")
        return cls(tp, pp, max(1, gpus // (tp * pp)), cuda_graph)

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"TP {self.tp} PP {self.pp} DP {self.dp}"


GPU_FLAGS = ("--num-workers", "2", "--hylo-kl-chunk", "4096")
# The whole step as one CUDA graph: a small model's step is otherwise as long as launching its kernels takes.
GRAPH_FLAGS = ("--cuda-graph-impl", "full_iteration", "--cuda-graph-warmup-steps", "2",
               "--no-check-for-nan-in-loss-and-grad")  # fmt: skip


class Training:
    """A stage's training, as processes that may be started before the student they wait for is there."""

    def __init__(self, stage: Stage, flags: list, save: Path, layout: Layout, log: Path):
        self.stage, self.steps, self.log = stage, save / "train_log.jsonl", log
        trainer = ["-m", "hylo_megatron.train", *map(str, flags), "--tensor-model-parallel-size", str(layout.tp),
                   "--pipeline-model-parallel-size", str(layout.pp)]  # fmt: skip
        trainer += ["--bf16"] if fast_bf16() else []
        if torch.cuda.is_available():
            trainer += GPU_FLAGS + (GRAPH_FLAGS if layout.cuda_graph and layout.ranks == 1 else ())
        threads = str(max(1, (os.cpu_count() or 1) // layout.ranks))
        environment = os.environ | {"OMP_NUM_THREADS": threads, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.ranks)]
        if layout.ranks == 1:  # the launcher would import torch only to start one process
            launcher = []
            # Port 0: whichever is free when the process listens; one that was free now may be taken by then.
            environment |= dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
        with log.open("a") as output:
            self.process = subprocess.Popen([sys.executable, *launcher, *trainer], stdout=output,
                                            stderr=subprocess.STDOUT, env=environment)  # fmt: skip

    def wait(self, running: Callable[[], object] = lambda: None) -> None:
        """Until the last step, showing how far it is; ``running`` is called once when the first step is done."""
        terminal, started, shown, told = sys.stdout.isatty(), time.time(), time.time(), False
        before = last_line(self.steps)
        while self.process.poll() is None:
            time.sleep(POLL_SECONDS)
            line = last_line(self.steps)
            if not told and line != before:
                told = True
                running()
            if time.time() - shown > (1 if terminal else 30):
                shown = time.time()
                _show(self.stage, line, started, terminal)
        if terminal:
            print("\r" + " " * 78 + "\r", end="", flush=True)
        if self.process.returncode:
            raise HyLoError(
                f"{self.stage.name} stopped ({_reason(self.process.returncode, self.log)}); see {self.log}."
                " The same command goes on from the last checkpoint"
            )

    def stop(self) -> None:
        self.process.terminate()
        self.process.wait()


def _reason(code: int, log: Path) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    errors = [line for line in log.read_text(errors="replace").splitlines() if "error: " in line.lower()]
    return errors[-1] if errors else f"exit code {code}"
