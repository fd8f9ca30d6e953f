"""FLOPs of Kimi Delta Attention beside the products with its weights. No torch."""

from hylo_megatron.config import Architecture

VALUE_COST = 2.1  # time of a value in the kernels of a GPU, in units of Gated DeltaNet's (fitted, planner/speed.py)


def mixing(arch: Architecture, length: int) -> int:
    """Return the FLOPs of a token in one layer: the state is read by the key, updated, and read by the query."""
    return 6 * arch.geometry.kda.num_heads * arch.geometry.kda.head_dim**2


def values(arch: Architecture, states: bool = False) -> int:
    """Return the values of a token's queries, keys, values and outputs in one layer.

    ``states``: see Gated DeltaNet.
    """
    return (6 if states else 4) * arch.geometry.kda.num_heads * arch.geometry.kda.head_dim
