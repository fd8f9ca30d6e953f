"""FLOPs of Gated DeltaNet beside the products with its weights. No torch."""

from hylo_megatron.config import Architecture

VALUE_COST = 1.0  # time of a value in the kernels of a GPU, in units of Gated DeltaNet's (fitted, planner/speed.py)


def mixing(arch: Architecture, length: int) -> int:
    """Return the FLOPs of a token in one layer: the state is read by the key, updated, and read by the query."""
    g = arch.geometry.gdn
    return 6 * g.num_value_heads * g.key_head_dim * g.value_head_dim


def values(arch: Architecture, states: bool = False) -> int:
    """Return the values of a token's queries, keys, values and outputs in one layer.

    Where ranks pass ``states``, K further values and outputs of a head give the map from first to last state.
    """
    g = arch.geometry.gdn
    width = g.value_head_dim + (g.key_head_dim if states else 0)
    return 2 * g.num_key_heads * g.key_head_dim + 2 * g.num_value_heads * width
