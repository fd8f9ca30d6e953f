"""What vLLM cannot serve of a hybrid, whatever its options. No torch or vLLM in here."""

from collections.abc import Iterator, Sequence

from hylo_megatron.config import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers import MIXERS
from hylo_megatron.serve.geometry import Served, serve


def refused_settings(
    mixers: Sequence[str], *, linear_rope: bool, window: dict | None, on_gpu: bool
) -> Iterator[tuple[str, str]]:
    """Yield each field of ``config.json`` with which a hybrid of ``mixers`` is refused, and why."""
    if linear_rope and "kda" in mixers and on_gpu:
        yield (
            "linear_rope",
            "vLLM's Kimi Delta Attention has no place for a rotation on a GPU; use transformers, or Gated DeltaNet",
        )
    if window and not any(MIXERS[kind].linear for kind in mixers):
        yield (
            "window",
            "vLLM keeps windows among the states of linear layers, and this plan has none; use transformers",
        )


def served(arch: Architecture, on_gpu: bool) -> Served:
    """Return what vLLM runs for a hybrid. Raises ``HyLoError`` where it refuses the model."""
    settings = {"linear_rope": arch.linear_rope, "window": arch.window}
    for field, reason in refused_settings(arch.plan, **settings, on_gpu=on_gpu):
        raise HyLoError(f"{field} in config.json: not supported for a hybrid: {reason}")
    return serve(arch.geometry, set(arch.plan), arch.num_attention_heads, arch.mla_qk_norm, on_gpu)
