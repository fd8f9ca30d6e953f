"""How many MLA layers a budget for the cache of keys and values allows."""

from fractions import Fraction

from hylo_megatron.config import Architecture, Plan
from hylo_megatron.config.student import student_architecture
from hylo_megatron.errors import HyLoError


def mla_layers(
    base: Architecture,
    geometry: str,
    linear: str,
    *,
    mla: int | None = None,
    share: float | None = None,
    cache_bytes: int | None = None,
) -> int:
    """Return how many layers may be MLA, by one of: their number, a share of the base model's cache, bytes a token.

    Bytes are those of the cache in bf16. Raises ``HyLoError`` if no layer fits, or if the model has fewer layers.
    """
    if mla is not None:
        if mla > base.num_layers:
            raise HyLoError(f"--mla {mla}: the base model has {base.num_layers} layers")
        return mla
    row = row_bytes(base, geometry, linear)
    allowed = cache_bytes if share is None else Fraction(str(share)) * base.kv_bytes_per_token()
    if allowed < row:
        flag = f"--cache-bytes {cache_bytes}" if share is None else f"--cache-share {share}"
        raise HyLoError(
            f"{flag}: no MLA layer fits; expected at least {row} bytes for a token, which are"
            f" {row / base.kv_bytes_per_token():.4f} of the base model's {base.kv_bytes_per_token()}"
        )
    return min(int(allowed // row), base.num_layers)


def row_bytes(base: Architecture, geometry: str, linear: str) -> int:
    """Return the bytes in bf16 that one MLA layer caches for a token."""
    plan = Plan(["mla", *[linear] * (base.num_layers - 1)])
    return student_architecture(base, plan, geometry).kv_bytes_per_token()
