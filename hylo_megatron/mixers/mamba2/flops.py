"""FLOPs of Mamba-2 beside the products with its weights. No torch."""

from hylo_megatron.config import Architecture


def mixing(arch: Architecture, length: int) -> int:
    """Return the FLOPs of a token in one layer: the state is updated and read."""
    g = arch.geometry.mamba2
    return 4 * g.num_heads * g.head_dim * g.state_size
