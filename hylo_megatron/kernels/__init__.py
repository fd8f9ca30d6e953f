"""Sequence kernels in torch, and the one place that decides between them and fla's on a GPU."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from hylo_megatron.kernels.conv import causal_conv1d
from hylo_megatron.kernels.gated_delta import chunk_gated_delta_rule, recurrent_gated_delta_rule
from hylo_megatron.kernels.norm import RMSNormGated, gated_rms_norm, l2norm, rms_norm
from hylo_megatron.kernels.ssd import mamba_split_conv1d_scan_combined, recurrent_ssd, ssd_chunk_scan

__all__ = [
    "Ops",
    "RMSNormGated",
    "causal_conv1d",
    "chunk_gated_delta_rule",
    "gated_rms_norm",
    "l2norm",
    "mamba_split_conv1d_scan_combined",
    "ops",
    "recurrent_gated_delta_rule",
    "recurrent_ssd",
    "rms_norm",
    "ssd_chunk_scan",
]


@dataclass(frozen=True)
class Ops:
    """The kernels a mixer runs: ``chunk`` for whole sequences, ``step`` for one token with a state."""

    name: str
    chunk_gated_delta_rule: Callable = chunk_gated_delta_rule
    step_gated_delta_rule: Callable = recurrent_gated_delta_rule
    chunk_ssd: Callable = ssd_chunk_scan
    step_ssd: Callable = recurrent_ssd
    causal_conv1d: Callable = causal_conv1d


@functools.lru_cache
def _ops(device_type: str) -> Ops:
    if device_type == "cuda":
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule, fused_recurrent_gated_delta_rule
        except ImportError:
            pass
        else:
            return Ops("fla", chunk_gated_delta_rule, fused_recurrent_gated_delta_rule)
    return Ops("torch")


def ops(device: torch.device | str) -> Ops:
    """fla's gated delta rule on a GPU where fla is installed, torch otherwise. SSD and convolution are torch's."""
    return _ops(torch.device(device).type)
