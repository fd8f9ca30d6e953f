"""Mamba-2 in vLLM, whose kernels take all sizes. No torch or vLLM in here."""

from hylo_megatron.mixers.mamba2.geometry import Mamba2Geometry
from hylo_megatron.mixers.serving import ServedPart, Target


def served(mamba2: Mamba2Geometry, target: Target) -> ServedPart:
    """Return the trained dimensions."""
    return ServedPart(geometry=mamba2)


def settings(vllm_config, *, on_gpu: bool) -> None:
    """Change nothing."""
