"""A budget for the cache of keys and values, and the plan that a ranking gives under it."""

from dataclasses import dataclass
from fractions import Fraction

from hylo_megatron.config import Architecture, Plan
from hylo_megatron.errors import HyLoError
from hylo_megatron.init.upcycle import student_architecture


@dataclass(frozen=True, kw_only=True)
class Budget:
    """One of: ``mla`` layers, a ``share`` of the base model's cache, or ``cache_bytes`` for a token in bf16."""

    mla: int | None = None
    share: float | None = None
    cache_bytes: int | None = None

    def layers(self, base: Architecture, geometry: str, linear: str) -> int:
        """Return how many layers may be MLA. Raises ``HyLoError`` if that is none, or more than there are."""
        if self.mla is not None:
            if self.mla > base.num_layers:
                raise HyLoError(f"--mla {self.mla}: the base model has {base.num_layers} layers")
            return self.mla
        row = row_bytes(base, geometry, linear)
        allowed = self.cache_bytes
        if self.share is not None:
            allowed = Fraction(str(self.share)) * base.kv_bytes_per_token()
        count = min(int(allowed // row), base.num_layers)
        if not count:
            flag = f"--cache-share {self.share}" if self.share is not None else f"--cache-bytes {self.cache_bytes}"
            raise HyLoError(
                f"{flag}: no MLA layer fits; expected at least {row} bytes for a token, which are"
                f" {row / base.kv_bytes_per_token():.4f} of the base model's {base.kv_bytes_per_token()}"
            )
        return count


def row_bytes(base: Architecture, geometry: str, linear: str) -> int:
    """Bytes in bf16 that one MLA layer caches for a token."""
    plan = Plan(["mla", *[linear] * (base.num_layers - 1)])
    return student_architecture(base, plan, geometry).kv_bytes_per_token()
