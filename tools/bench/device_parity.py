"""Compare the first training steps on the GPU and on the CPU, with the same checkpoint, data and flags.

    python tools/bench/device_parity.py --student CKPT --teacher CKPT --data PREFIX --out DIR [--steps 20]

Prints the largest relative difference of the losses for both stages, in bf16 and fp32. Differences above the limits
are an error.
"""

import argparse
import os
from pathlib import Path

from bench_run import step_lines

from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line, size
from hylo_megatron.parent import ALONE, PARENT
from hylo_megatron.run.launch import Process, child_environment

LIMITS = {"bf16": 1e-2, "fp32": 1e-4}
STAGES = {"ild": ["--lr", "2e-4"], "distill": ["--lr", "3e-5"]}


def start(options: argparse.Namespace, stage: str, dtype: str, device: str) -> Process:
    """Start a training of ``options.steps`` steps on one device."""
    save = options.out / f"{stage}-{dtype}-{device}"
    flags = [
        "--hylo-stage", stage, "--hylo-student", options.student, "--hylo-teacher", options.teacher, "--save", save,
        "--data-path", options.data, "--seq-length", options.seq_length, "--micro-batch-size", 2,
        "--global-batch-size", 2, "--train-iters", options.steps, "--lr-decay-style", "cosine",
        "--lr-warmup-fraction", 0.1, "--save-interval", 10**9, "--no-save-optim", *STAGES[stage],
        *(["--bf16"] if dtype == "bf16" else []),
    ]  # fmt: skip
    own = ALONE | {PARENT: str(os.getpid()), "OMP_NUM_THREADS": str(options.threads)}
    own |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    trainer = ["-m", "hylo_megatron.train", *map(str, flags)]
    return Process(trainer, options.out / f"{save.name}.log", child_environment(1, **own))


def losses(options: argparse.Namespace, stage: str, dtype: str, device: str) -> list[float]:
    log = options.out / f"{stage}-{dtype}-{device}" / "train_log.jsonl"
    found = [line["loss"] for line in step_lines(log)]
    if len(found) != options.steps:
        raise HyLoError(
            f"{log}: {len(found)} steps of {options.steps}; see {options.out}/{stage}-{dtype}-{device}.log"
        )
    return found


@command_line
def main() -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--student", required=True)
    add("--teacher", required=True)
    add("--data", required=True, help="tokens of hylo prepare-data")
    add("--out", required=True, type=Path)
    add("--steps", type=size, default=20)
    add("--seq-length", type=size, default=256)
    add("--threads", type=size, default=4, help="threads of each CPU run; four run at once")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    cells = [(stage, dtype) for stage in STAGES for dtype in LIMITS]
    on_cpu = [start(options, *cell, "cpu") for cell in cells]
    for cell in cells:
        start(options, *cell, "cuda").popen.wait()
    for process in on_cpu:
        process.popen.wait()
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
