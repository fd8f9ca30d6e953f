"""Profile a few training steps of each stage of a run with torch's profiler.

    python tools/bench/train_step.py --run runs/smollm2-3MLA27GDN --out DIR [--stage distill-2k] [--no-cuda-graph]

``--run`` is the folder of a recipe's run, whose student, teacher, data sets and recipe are read but not changed.
Prints tokens/s, peak memory, the time of every group of kernels, and the floor: the step's matrix products at the
rate of a large product, measured on the same device.
Writes the same with every kernel's own time to ``DIR/STAGE.json``.
"""

import argparse
import gzip
import json
import re
import statistics
from collections import defaultdict
from dataclasses import replace
from math import prod
from pathlib import Path

import torch

from hylo_megatron.config import Architecture
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.convert.shapes import hf_shapes
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import command_line
from hylo_megatron.recipes.stage import Stage
from hylo_megatron.run.datasets import data_path
from hylo_megatron.run.launch import Processes
from hylo_megatron.run.training_process import TrainingProcess

STEPS, PROFILED = 14, 2  # the last but one are profiled, the steps before are timed
GROUPS = {  # the first group that matches a kernel's name is used
    "attention": r"flash|fmha|attention|softmax_",
    "matrix products": r"gemm|nvjet|cutlass|splitk|aten::(mm|addmm|bmm|baddbmm|linear|matmul)",
    "projection, convolved": r"convolve|copy_backward|conv1d|ShiftedProducts",
    "linear recurrence": r"chunk|wy_repr|recompute_w|solve|cumsum|l2norm|kkt|^kernel_kernel|ChunkedScan",
    "gated norm, SwiGLU": r"gated|swiglu",
    "norms": r"norm",
    "KL": r"^statistics|^gradient|HeadLoss",
    "optimizer": r"multi_tensor|adam",
    "copies": r"copy|memcpy|memset|cat|fill|clone|contiguous",
    "sums and elementwise": r"reduce|elementwise|aten::",
}


def product_flops(arch: Architecture, stage: Stage) -> int:
    """Return the FLOPs per token: teacher forward, student forward and backward, without attention scores."""
    head = arch.vocab_size * arch.hidden_size
    blocks = [prod(s) for key, s in hf_shapes(arch).items() if len(s) == 2 and ".layers." in key]
    copied = sum(prod(s) for key, s in hf_shapes(arch).items() if ".mlp." in key and len(s) == 2)
    teacher = sum(blocks)  # an approximation: the teacher's mixers are smaller than the student's
    if stage_kind(stage.kind).layerwise:
        return 2 * teacher + 6 * sum(blocks) - 2 * copied
    return 2 * (teacher + head) + 6 * (sum(blocks) + head)


def matrix_rate(device: torch.device) -> float:
    """Measure FLOP/s of one large bf16 product."""
    size = 8192 if device.type == "cuda" else 1024
    a = torch.randn(size, size, device=device, dtype=torch.bfloat16)
    times = []
    for _ in range(5):
        if device.type == "cuda":
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(), a @ a, end.record()
            torch.cuda.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        else:
            with torch.autograd.profiler.profile() as p:
                a @ a
            times.append(p.self_cpu_time_total / 1e6)
    return 2 * size**3 / min(times)


def self_times(events: list[dict]) -> dict[str, float]:
    """Return microseconds by name; the time of an event excludes the events inside it."""
    times: dict[str, float] = defaultdict(float)
    lanes = defaultdict(list)
    for event in events:
        lanes[event["pid"], event["tid"]].append(event)
    for lane in lanes.values():
        open_events: list[tuple[float, str]] = []
        for event in sorted(lane, key=lambda e: (e["ts"], -e["dur"])):
            while open_events and open_events[-1][0] <= event["ts"]:
                open_events.pop()
            if open_events:
                times[open_events[-1][1]] -= event["dur"]
            times[event["name"]] += event["dur"]
            open_events.append((event["ts"] + event["dur"], event["name"]))
    return times


def read_trace(path: Path) -> tuple[dict[str, float], dict[str, int]]:
    """Return ``(milliseconds, calls)`` per step, by kernel (on a CPU by operator)."""
    with gzip.open(path, "rt") as file:
        events = [e for e in json.load(file)["traceEvents"] if e.get("ph") == "X"]
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"}
    if not any(e.get("cat") in kinds for e in events):
        kinds = {"cpu_op"}
    events = [e for e in events if e.get("cat") in kinds]
    calls: dict[str, int] = defaultdict(int)
    for event in events:
        calls[event["name"]] += 1
    times = self_times(events)
    return {n: t / 1e3 / PROFILED for n, t in times.items()}, {n: c // PROFILED for n, c in calls.items()}


def grouped(times: dict[str, float]) -> dict[str, float]:
    sums: dict[str, float] = defaultdict(float)
    for name, time in times.items():
        label = next((g for g, pattern in GROUPS.items() if re.search(pattern, name, re.I)), "other")
        sums[label] += time
    return dict(sorted(sums.items(), key=lambda item: -item[1]))


def measure(run: Path, stage: Stage, student: Path, out: Path, graph: bool, rate: float) -> None:
    short, folder = replace(stage, steps=STEPS), out / stage.name
    folder.mkdir(parents=True)
    flags = [*short.flags(), "--hylo-student", student, "--hylo-teacher", run / "teacher", "--save", folder,
             "--save-interval", 10**9, "--no-save-optim", "--seed", 1, "--data-path", *data_path(run / "data", stage),
             "--profile", "--use-pytorch-profiler", "--profile-step-start", STEPS - PROFILED - 1,
             "--profile-step-end", STEPS - 1, "--tensorboard-dir", folder / "events"]  # fmt: skip
    processes = Processes.found(cuda_graph=graph)
    TrainingProcess(short, flags, folder, processes, out / f"{stage.name}.log").wait()
    lines = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    timed = [line["seconds"] for line in lines[4 : STEPS - PROFILED - 3]]
    times, calls = read_trace(folder / "torch_profile" / "rank-0.json.gz")
    tokens, step = stage.global_batch * stage.seq_length, statistics.median(timed)
    floor = tokens * product_flops(Architecture.load(student), stage) / rate
    memory = f", peak {lines[-1]['memory_gib']} GiB" if torch.cuda.is_available() else ""
    print(f"{stage.name}: {tokens} tokens in {step * 1e3:.1f} ms, {tokens / step:,.0f} tokens/s{memory};"
          f" products at {rate / 1e12:.1f} TFLOP/s: {floor * 1e3:.1f} ms, {step / floor:.1f} times that")  # fmt: skip
    groups = grouped(times)
    for label, time in groups.items():
        print(f"    {label:22}{time:9.2f} ms {time / sum(groups.values()):7.1%}")
    kernels = [
        {"name": n, "ms": round(t, 4), "calls": calls[n]} for n, t in sorted(times.items(), key=lambda i: -i[1])
    ]
    result = {"stage": stage.name, "seconds": step, "tokens": tokens, "floor_seconds": floor, "groups": groups}
    (out / f"{stage.name}.json").write_text(json.dumps(result | {"kernels": kernels}, indent=1))


@command_line
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path)
    parser.add_argument("--stage", action="append", help="name of a stage; may be repeated (default: all)")
    parser.add_argument("--no-cuda-graph", action="store_true")
    options = parser.parse_args()
    recipe = json.loads((options.run / "recipe.json").read_text())
    stages = [Stage(**s | {"mix": tuple(map(tuple, s["mix"]))}) for s in recipe["stages"]]
    unknown = set(options.stage or ()) - {s.name for s in stages}
    if unknown:
        raise HyLoError(f"--stage {sorted(unknown)[0]}: {options.run} has {', '.join(s.name for s in stages)}")
    rate = matrix_rate(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    for stage in stages:
        if stage.name in (options.stage or [s.name for s in stages]):
            measure(options.run, stage, options.run / "student", options.out, not options.no_cuda_graph, rate)


if __name__ == "__main__":
    main()
