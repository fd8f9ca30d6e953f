"""Sequence kernels: torch references, fla's Triton kernels on a GPU, and ``ops``, which chooses between them."""

from hylo_megatron.kernels.choose import Ops, ops, ops_for
from hylo_megatron.kernels.conv import causal_conv1d
from hylo_megatron.kernels.gated_delta import (
    chunk_gated_delta_rule,
    chunk_kda,
    kda_decay,
    log_decay,
    recurrent_gated_delta_rule,
    recurrent_kda,
)
from hylo_megatron.kernels.mamba_interface import RMSNormGated, mamba_split_conv1d_scan_combined
from hylo_megatron.kernels.norm import gated_rms_norm, l2norm, rms_norm, swiglu
from hylo_megatron.kernels.ssd import recurrent_ssd, ssd_chunk_scan

__all__ = [
    "Ops",
    "RMSNormGated",
    "causal_conv1d",
    "chunk_gated_delta_rule",
    "chunk_kda",
    "gated_rms_norm",
    "kda_decay",
    "l2norm",
    "log_decay",
    "mamba_split_conv1d_scan_combined",
    "ops",
    "ops_for",
    "recurrent_gated_delta_rule",
    "recurrent_kda",
    "recurrent_ssd",
    "rms_norm",
    "ssd_chunk_scan",
    "swiglu",
]
