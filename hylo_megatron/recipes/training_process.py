"""Starts a training run under torchrun and shows how far it is."""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

import torch

from hylo_megatron.errors import HyLoError
from hylo_megatron.recipes.stage import Stage

POLL_SECONDS = 1.0


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


def train(stage: Stage, student: Path, teacher: Path, save: Path, data: Path, tp: int, pp: int, save_every: int,
          log: Path) -> None:  # fmt: skip
    """Runs until ``stage.steps``; called again after an interruption it goes on from the last checkpoint."""
    ranks = tp * pp
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks),
        "-m", "hylo_megatron.train", *stage.flags(), "--hylo-student", str(student), "--hylo-teacher", str(teacher),
        "--save", str(save), "--save-interval", str(save_every), "--data-path", str(data),
        "--tensor-model-parallel-size", str(tp), "--pipeline-model-parallel-size", str(pp),
    ]  # fmt: skip
    if fast_bf16():
        command.append("--bf16")
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    environment = os.environ | {"OMP_NUM_THREADS": threads, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    terminal, started, shown = sys.stdout.isatty(), time.time(), 0.0
    with log.open("a") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            while process.poll() is None:
                time.sleep(POLL_SECONDS)
                if time.time() - shown > (1 if terminal else 30):
                    shown = time.time()
                    _show(stage, last_line(save / "train_log.jsonl"), started, terminal)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if terminal:
        print("\r" + " " * 78 + "\r", end="", flush=True)
    if process.returncode:
        errors = [line for line in log.read_text(errors="replace").splitlines() if "error: " in line.lower()]
        raise HyLoError(
            f"{stage.name} stopped with exit code {process.returncode}: {(errors or ['?'])[-1]}; see {log}"
        )
