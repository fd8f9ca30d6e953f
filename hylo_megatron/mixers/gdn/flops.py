"""FLOPs of Gated DeltaNet beside the products with its weights. No torch."""

from hylo_megatron.config import Architecture

VALUE_COST = 1.0  # time of a value in the kernels of a GPU, in units of Gated DeltaNet's (fitted, planner/speed.py)


def mixing(arch: Architecture, length: int) -> int:
    """Return the FLOPs of a token in one layer: the state is read by the key, updated, and read by the query."""
    g = arch.geometry.gdn
    return 6 * g.num_value_heads * g.key_head_dim * g.value_head_dim


def values(arch: Architecture) -> int:
    """Return the values of a token's queries, keys, values and outputs in one layer."""
    g = arch.geometry.gdn
    return 2 * g.num_key_heads * g.key_head_dim + 2 * g.num_value_heads * g.value_head_dim
