"""The choice of the mixers' kernels: torch references, or Triton kernels on a GPU (fla's and ours)."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch

from hylo_megatron.kernels import attention, conv, fp8, gated_delta, norm, rope, ssd


@dataclass(frozen=True)
class Ops:
    """The kernels of the mixers: ``chunk`` for whole sequences, ``step`` for one token with a state."""

    name: str
    chunk_gated_delta_rule: Callable = gated_delta.chunk_gated_delta_rule
    step_gated_delta_rule: Callable = gated_delta.recurrent_gated_delta_rule
    chunk_kda: Callable = gated_delta.chunk_kda
    step_kda: Callable = gated_delta.recurrent_kda
    chunk_ssd: Callable = ssd.ssd_chunk_scan
    step_ssd: Callable = ssd.recurrent_ssd
    causal_conv1d: Callable = conv.causal_conv1d
    split_convolve: Callable = conv.split_convolve
    rotate: Callable = rope.rotate
    rms_norm: Callable = norm.rms_norm
    gated_rms_norm: Callable = norm.gated_rms_norm
    swiglu: Callable = norm.swiglu
    swiglu_packed: Callable = norm.swiglu_packed
    distance: Callable = norm.distance
    quantise_rows: Callable = fp8.quantise_rows
    join_attention: Callable = attention.join_attention


TORCH = Ops("torch")


@functools.lru_cache
def _fused() -> Ops | None:
    """Return fla's kernels; None if fla is not installed."""
    try:
        from hylo_megatron.kernels import fused
    except ImportError:
        return None
    names = {field.name for field in fields(Ops)} & set(fused.__all__)
    return Ops("fla", **{name: getattr(fused, name) for name in names})


def ops(device: torch.device | str, dtype: torch.dtype = torch.bfloat16) -> Ops:
    """Return fla's kernels for 16-bit tensors on a GPU with fla, otherwise torch's.

    fp32 uses torch on a GPU too: fla would round matrix products to TF32, and on Hopper its backward pass does not
    compile for fp32.
    """
    if torch.device(device).type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return _fused() or TORCH
    return TORCH


def ops_for(x: torch.Tensor) -> Ops:
    """Return the kernels for tensors like ``x``."""
    return ops(x.device, x.dtype)
