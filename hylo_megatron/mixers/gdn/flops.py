"""FLOPs of Gated DeltaNet beside the products with its weights. No torch."""

from hylo_megatron.config import Architecture


def mixing(arch: Architecture, length: int) -> int:
    """Return the FLOPs of a token in one layer: the state is read by the key, updated, and read by the query."""
    g = arch.geometry.gdn
    return 6 * g.num_value_heads * g.key_head_dim * g.value_head_dim
