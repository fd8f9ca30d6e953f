"""Compare the first training steps on the GPU and on the CPU, with the same checkpoint, data and flags.

    python tools/bench/device_parity.py --student CKPT --teacher CKPT --data PREFIX --out DIR [--steps 20]

Prints the largest relative difference of the losses for both stages, in bf16 and fp32. Differences above the limits
are an error.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import command_line

LIMITS = {"bf16": 1e-2, "fp32": 1e-4}
STAGES = {"ild": ["--lr", "2e-4"], "distill": ["--lr", "3e-5"]}


def start(options, stage: str, dtype: str, device: str) -> subprocess.Popen:
    """Start a training of ``options.steps`` steps on one device."""
    save = options.out / f"{stage}-{dtype}-{device}"
    flags = [
        "--hylo-stage", stage, "--hylo-student", options.student, "--hylo-teacher", options.teacher, "--save", save,
        "--data-path", options.data, "--seq-length", options.seq_length, "--micro-batch-size", 2,
        "--global-batch-size", 2, "--train-iters", options.steps, "--lr-decay-style", "cosine",
        "--lr-warmup-fraction", 0.1, "--save-interval", 10**9, "--no-save-optim", *STAGES[stage],
        *(["--bf16"] if dtype == "bf16" else []),
    ]  # fmt: skip
    environment = os.environ | dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1",
                                    MASTER_PORT="0", OMP_NUM_THREADS=str(options.threads))  # fmt: skip
    if device == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    log = (options.out / f"{save.name}.log").open("w")
    command = [sys.executable, "-m", "hylo_megatron.train", *map(str, flags)]
    return subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)


def losses(options, stage: str, dtype: str, device: str) -> list[float]:
    log = options.out / f"{stage}-{dtype}-{device}" / "train_log.jsonl"
    found = [json.loads(line)["loss"] for line in log.read_text().splitlines()] if log.is_file() else []
    if len(found) != options.steps:
        raise HyLoError(
            f"{log}: {len(found)} steps of {options.steps}; see {options.out}/{stage}-{dtype}-{device}.log"
        )
    return found


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--student", required=True)
    parser.add_argument("--teacher", required=True)
    parser.add_argument("--data", required=True, help="tokens of hylo prepare-data")
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--seq-length", type=int, default=256)
    parser.add_argument("--threads", type=int, default=4, help="threads of each CPU run; four run at once")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cells = [(stage, dtype) for stage in STAGES for dtype in LIMITS]
    on_cpu = [start(options, *cell, "cpu") for cell in cells]
    for cell in cells:
        start(options, *cell, "cuda").wait()
    for process in on_cpu:
        process.wait()
    wrong = []
    for stage, dtype in cells:
        pairs = list(zip(*(losses(options, stage, dtype, device) for device in ("cuda", "cpu")), strict=True))
        worst = max(abs(a - b) / abs(b) for a, b in pairs)
        print(f"{stage:8s} {dtype}: largest relative difference of {len(pairs)} losses {worst:.2e}"
              f" (allowed {LIMITS[dtype]:.0e}); last {pairs[-1][0]:.5f} and {pairs[-1][1]:.5f}")  # fmt: skip
        wrong += [f"{stage} {dtype}"] if worst > LIMITS[dtype] else []
    if wrong:
        raise HyLoError(f"GPU and CPU disagree: {', '.join(wrong)}")


if __name__ == "__main__":
    main()
