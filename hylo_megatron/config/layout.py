"""Which parallel layouts an architecture allows."""

from hylo_megatron.config.architecture import Architecture
from hylo_megatron.config.plan import megatron_pattern
from hylo_megatron.errors import HyLoError


def check_layout(arch: Architecture, tp: int = 1, pp: int = 1, cp: int = 1) -> None:
    """Raises ``HyLoError`` when a head count does not divide by the parallel sizes."""
    counts = {"attention heads": (arch.num_attention_heads, tp)}
    if "attention" in arch.plan:
        counts["key-value heads"] = (arch.num_key_value_heads, tp)
    if "gdn" in arch.plan:
        counts["GDN key heads"] = (arch.geometry.gdn.num_key_heads, tp * cp)
    if "mamba2" in arch.plan:
        counts["Mamba-2 groups"] = (arch.geometry.mamba2.num_groups, tp * cp)
    for name, (count, ranks) in counts.items():
        if count % ranks:
            fits = [size for size in range(1, count + 1) if count % size == 0]
            raise HyLoError(f"parallel size {ranks}: {count} {name} do not divide by it; sizes that do: {fits}")
    megatron_pattern(arch.plan, pp)
