"""A table of where the time of a training step goes on one rank: kernels by group, and times without any.

torch's profiler records the kernels of two steps. Only sums are kept: a few KB, where a trace has gigabytes. On a CPU
operators take the place of kernels, with the time that each spends outside the operators that it calls. What the rank
sends to others in these steps is counted (``sent_bytes.py``).
"""

from __future__ import annotations

import atexit
import os
import re
import sys
import time
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from hylo_megatron.files import write_json

PROFILED = 2  # steps
LEAST_STEPS = PROFILED + 3  # in the first two steps kernels are compiled; the last step ends the table
SHOWN, WIDEST = 40, 120  # kernels that are listed by name, and characters of a name
COMMUNICATION = "communication"
GROUPS = {  # the first group that matches a kernel's name is used
    COMMUNICATION: r"nccl|c10d::|gloo|memcpy ptop",
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


class Span(NamedTuple):
    """One kernel or operator. ``lane``: the stream or thread that ran it. Times are in nanoseconds."""

    name: str
    start: int
    duration: int
    lane: int

    @property
    def end(self) -> int:
        return self.start + self.duration


def group_of(name: str) -> str:
    return next((group for group, pattern in GROUPS.items() if re.search(pattern, name, re.I)), "other")


def self_times(spans: Iterable[Span]) -> dict[str, float]:
    """Return milliseconds by name; the time of a span excludes the spans inside it."""
    times: dict[str, float] = defaultdict(float)
    lanes = defaultdict(list)
    for span in spans:
        lanes[span.lane].append(span)
    for lane in lanes.values():
        around: list[Span] = []
        for span in sorted(lane, key=lambda s: (s.start, -s.duration)):
            while around and around[-1].end <= span.start:
                around.pop()
            if around:
                times[around[-1].name] -= span.duration / 1e6
            times[span.name] += span.duration / 1e6
            around.append(span)
    return times


def covered(spans: Iterable[Span]) -> float:
    """Return the milliseconds in which at least one of ``spans`` runs."""
    total = end = 0
    for span in sorted(spans, key=lambda s: s.start):
        total += max(0, span.end - max(end, span.start))
        end = max(end, span.end)
    return total / 1e6


def summary(spans: list[Span], wall_ms: float, steps: int) -> dict:
    """Return the table: milliseconds of one step.

    ``exposed_communication_ms`` counts the times in which ranks communicate and nothing else runs, ``idle_ms`` those
    in which nothing runs.
    """
    times, calls, groups = self_times(spans), defaultdict(int), defaultdict(float)
    for span in spans:
        calls[span.name] += 1
    for name, spent in times.items():
        groups[group_of(name)] += spent / steps
    busy = covered(spans)
    computing = covered(span for span in spans if group_of(span.name) != COMMUNICATION)
    slowest = sorted(times.items(), key=lambda item: -item[1])
    return {
        "step_ms": round(wall_ms / steps, 3), "busy_ms": round(busy / steps, 3),
        "idle_ms": round(max(0.0, wall_ms - busy) / steps, 3),
        "exposed_communication_ms": round((busy - computing) / steps, 3),
        "groups": {group: round(spent, 3) for group, spent in sorted(groups.items(), key=lambda item: -item[1])},
        "kernels": [
            {"name": name[:WIDEST], "ms": round(spent / steps, 4), "calls": round(calls[name] / steps, 1)}
            for name, spent in slowest[:SHOWN]
        ],
    }  # fmt: skip


def recorded(profile) -> list[Span]:
    """Return the kernels of a stopped ``torch.profiler.profile``, or its operators where no kernel ran."""
    from torch.autograd import DeviceType

    events = profile.profiler.kineto_results.events()
    device = [e for e in events if e.device_type() == DeviceType.CUDA and not e.is_user_annotation()]
    if device:
        return [Span(e.name(), e.start_ns(), e.duration_ns(), e.device_resource_id()) for e in device]
    return [Span(e.name(), e.start_ns(), e.duration_ns(), e.start_thread_id()) for e in events]


class StepProfile:
    """Profiles the two steps before the last one, from the start of a step to the start of another.

    Writes ``FOLDER/rank-N.json``.
    """

    def __init__(self, folder: Path, steps: int):
        self.folder, self.first, self.last = folder, steps - 1 - PROFILED, steps - 1
        self.profile = self.sent = None
        self.began = 0.0

    def begin_step(self, step: int) -> None:
        """Tell that a step begins, which is counted from 0."""
        if step == self.first:
            self._start()
        elif step == self.last and self.profile:
            self._stop()

    def _start(self) -> None:
        import torch
        from torch.profiler import ProfilerActivity, profile

        from hylo_megatron.engine.register import install
        from hylo_megatron.engine.sent_bytes import Sent

        on_gpu = torch.cuda.device_count() > 0
        self.profile = profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU])
        self.profile.start()
        self.sent = Sent()
        install("counting", self.sent)
        torch.cuda.synchronize()
        self.began = time.perf_counter()

    def _stop(self) -> None:
        import torch

        from hylo_megatron.engine.register import uninstall

        torch.cuda.synchronize()
        wall_ms = 1e3 * (time.perf_counter() - self.began)
        uninstall("counting")
        self.profile.stop()
        rank = torch.distributed.get_rank()
        table = {"rank": rank, "memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 2)}
        table |= {"sent": self.sent.table(PROFILED)}
        self.folder.mkdir(parents=True, exist_ok=True)
        write_json(self.folder / f"rank-{rank}.json", table | summary(recorded(self.profile), wall_ms, PROFILED))
        self.profile = None


def end_without_cupti() -> None:
    """End this process, whose work is done, on a GPU without the destructors of native libraries.

    After a profile CUPTI may write to memory that torch has freed, and then glibc aborts a process that has finished
    (pytorch's pull request 195207; seen with torch 2.11 on H100s, after each profile of steps of 64K tokens and more).
    """
    import torch

    if torch.cuda.device_count():
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)
