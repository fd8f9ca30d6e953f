"""Which kernels run: torch's references, or fla's Triton kernels on a GPU. The one place that decides."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hylo_megatron.kernels.conv import causal_conv1d
from hylo_megatron.kernels.gated_delta import chunk_gated_delta_rule, recurrent_gated_delta_rule
from hylo_megatron.kernels.norm import gated_rms_norm, swiglu
from hylo_megatron.kernels.ssd import recurrent_ssd, ssd_chunk_scan


@dataclass(frozen=True)
class Ops:
    """The kernels of the mixers: ``chunk`` for whole sequences, ``step`` for one token with a state."""

    name: str
    chunk_gated_delta_rule: Callable = chunk_gated_delta_rule
    step_gated_delta_rule: Callable = recurrent_gated_delta_rule
    chunk_ssd: Callable = ssd_chunk_scan
    step_ssd: Callable = recurrent_ssd
    causal_conv1d: Callable = causal_conv1d
    gated_rms_norm: Callable = gated_rms_norm
    swiglu: Callable = swiglu


TORCH = Ops("torch")


@functools.lru_cache
def _fused() -> Ops | None:
    """fla's kernels; None where fla is not installed."""
    try:
        from hylo_megatron.kernels import fused
    except ImportError:
        return None
    return Ops(
        "fla", fused.chunk_gated_delta_rule, fused.step_gated_delta_rule, fused.ssd_chunk_scan, recurrent_ssd,
        fused.causal_conv1d, fused.gated_rms_norm, fused.swiglu,
    )  # fmt: skip


def ops(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Ops:
    """fla's kernels for 16-bit tensors on a GPU where fla is installed, torch's otherwise.

    fp32 stays with torch on a GPU too: fla's products would round it to TF32, and on Hopper its backward does not
    compile for fp32.
    """
    if torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return _fused() or TORCH
    return TORCH


def ops_for(x: torch.Tensor) -> Ops:
    """The kernels for tensors like ``x``."""
    return ops(x.device, x.dtype)
