"""Starts a training run under torchrun and shows how far it is."""

import json
import math
import os
import signal
import subprocess
import sys
import time
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
    lines = log.read_text().splitlines() if log.is_file() else []
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

    @classmethod
    def found(cls, tp: int, pp: int) -> "Layout":
        gpus = torch.cuda.device_count()
        if gpus and gpus % (tp * pp):
            raise HyLoError(f"TP {tp} x PP {pp} = {tp * pp} ranks do not divide the {gpus} GPUs here")
        return cls(tp, pp, max(1, gpus // (tp * pp)))

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.dp

    def __str__(self) -> str:
        return f"TP {self.tp} PP {self.pp} DP {self.dp}"


def train(stage: Stage, flags: list, save: Path, layout: Layout, log: Path) -> None:
    """Runs until ``stage.steps``; called again after an interruption it goes on from the last checkpoint."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.ranks),
        "-m", "hylo_megatron.train", *map(str, flags),
        "--tensor-model-parallel-size", str(layout.tp), "--pipeline-model-parallel-size", str(layout.pp),
    ]  # fmt: skip
    if fast_bf16():
        command.append("--bf16")
    threads = str(max(1, (os.cpu_count() or 1) // layout.ranks))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    with log.open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _watch(process, stage, save / "train_log.jsonl")
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if process.returncode:
        raise HyLoError(
            f"{stage.name} stopped ({_reason(process.returncode, log)}); see {log}."
            " The same command goes on from the last checkpoint"
        )


def _reason(code: int, log: Path) -> str:
    if code < 0:
        return f"killed by {signal.Signals(-code).name}"
    errors = [line for line in log.read_text(errors="replace").splitlines() if "error: " in line.lower()]
    return errors[-1] if errors else f"exit code {code}"


def _watch(process: subprocess.Popen, stage: Stage, steps: Path) -> None:
    """Shows how far the run is until it ends."""
    terminal, started, shown = sys.stdout.isatty(), time.time(), time.time()
    while process.poll() is None:
        time.sleep(POLL_SECONDS)
        if time.time() - shown > (1 if terminal else 30):
            shown = time.time()
            _show(stage, last_line(steps), started, terminal)
    if terminal:
        print("\r" + " " * 78 + "\r", end="", flush=True)
