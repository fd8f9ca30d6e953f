"""Kimi Delta Attention in vLLM, whose kernels take all sizes that fla's take. No torch or vLLM in here."""

from hylo_megatron.mixers.kda.geometry import KDAGeometry
from hylo_megatron.mixers.serving import ServedPart, Target


def served(kda: KDAGeometry, target: Target) -> ServedPart:
    """Return the trained dimensions."""
    return ServedPart(geometry=kda)


def settings(vllm_config, *, on_gpu: bool) -> None:
    """Change nothing."""
