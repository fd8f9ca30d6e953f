"""FLOPs of Mamba-2 beside the products with its weights. No torch."""

from hylo_megatron.config import Architecture

VALUE_COST = 1.4  # time of a value in the kernels of a GPU, in units of Gated DeltaNet's (fitted, planner/speed.py)


def mixing(arch: Architecture, length: int) -> int:
    """Return the FLOPs of a token in one layer: the state is updated and read."""
    g = arch.geometry.mamba2
    return 4 * g.num_heads * g.head_dim * g.state_size


def values(arch: Architecture, states: bool = False) -> int:
    """Return the values of a token's queries, keys, values and outputs in one layer, also where ranks pass states."""
    g = arch.geometry.mamba2
    return 2 * g.num_heads * g.head_dim + 2 * g.num_groups * g.state_size
