"""FLOPs of Kimi Delta Attention beside the products with its weights. No torch."""

from hylo_megatron.config import Architecture


def mixing(arch: Architecture, length: int) -> int:
    """Return the FLOPs of a token in one layer: the state is read by the key, updated, and read by the query."""
    return 6 * arch.geometry.kda.num_heads * arch.geometry.kda.head_dim**2
