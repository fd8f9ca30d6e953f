"""Refuse a training that cannot fit the GPU, by the planner's count, before CUDA starts and a kernel is compiled."""

import argparse
import ctypes
import os
import sys

from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import ParallelLayout, Work
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.distill.losses import loss_of
from hylo_megatron.errors import HyLoError
from hylo_megatron.planner.training import PlannedRun, peaks

GIB = 1 << 30
BESIDE = GIB  # at most what CUDA's context and NCCL's buffers take beside torch's allocator
SURE = 1.05  # a plan above this share of the memory cannot fit: the planner's count may be some percent too high
# Flags of Megatron (or how they begin) that need less memory than the planner counts
UNPLANNED = ("--use-precision-aware-optimizer", "--optimizer", "--grad-reduce-in-bf16", "--cpu-offloading",
             "--use-megatron-fsdp", "--use-torch-fsdp2", "--fine-grained-activation-offloading", "--fp8",
             "--fp4")  # fmt: skip


def gpu_bytes(index: int) -> int | None:
    """Return the memory of a GPU as the driver knows it, or None without a GPU. No CUDA context is made."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    device, total = ctypes.c_int(), ctypes.c_size_t()
    calls = (
        lambda: driver.cuInit(0),
        lambda: driver.cuDeviceGet(ctypes.byref(device), index),
        lambda: driver.cuDeviceTotalMem_v2(ctypes.byref(total), device),
    )
    return None if any(call() for call in calls) else total.value


def planned_run(
    known: argparse.Namespace, student: Architecture, teacher: Architecture, layout: ParallelLayout, work: Work
) -> PlannedRun | None:
    """Return the run for the planner, or None where layers are recomputed in a way that the planner cannot count."""
    kind = stage_kind(known.hylo_stage)
    layers = {"block": "recompute", "uniform": "recompute_chunk"}.get(known.recompute_method)
    if known.recompute_granularity and (known.recompute_granularity != "full" or not layers):
        return None
    recomputed = {layers: known.recompute_num_layers or 0} if known.recompute_granularity else {}
    return PlannedRun(
        student=student, teacher=teacher, kind=kind, loss=loss_of(kind, known), layout=layout, work=work,
        train=known.hylo_train or kind.train, mlp_block=known.hylo_mlp_block,
        recurrence_block=known.hylo_recurrence_block, teacher_fp8=known.hylo_teacher_fp8,
        offload_teacher=known.hylo_offload_teacher, offload_optimizer=known.hylo_offload_optimizer, **recomputed,
    )  # fmt: skip


def check_memory(run: PlannedRun | None, user: list[str], available: int | None = None) -> None:
    """Raise ``HyLoError`` if a rank's peak is far above the memory of its GPU; warn if the two are close.

    ``available``: bytes of the GPU (default: those of this rank's). Nothing is checked without a GPU, for a control,
    and for a run that the planner cannot count.
    """
    available = available or gpu_bytes(int(os.environ.get("LOCAL_RANK", 0)))
    if not available or run is None or not run.student.is_hybrid or "--no-memory-check" in user:
        return
    if any(word.startswith(UNPLANNED) for word in user):
        return
    need = max(each.total for each in peaks(run))
    if need + BESIDE <= available:
        return
    text = (
        f"memory: the fullest rank needs {need / GIB:.1f} GiB by the planner's count, and the GPU has"
        f" {available / GIB:.1f}"
    )
    if need <= SURE * available:
        print(f"warning: {text}, of which CUDA itself takes up to 1", file=sys.stderr, flush=True)
        return
    raise HyLoError(
        f"{text}; lower --micro-batch-size, take more ranks (hylo plan counts), or recompute sub-layers"
        " (--recompute-granularity full --recompute-method block --recompute-num-layers N); --no-memory-check starts"
        " anyway"
    )
