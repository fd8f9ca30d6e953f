"""Dimensions of Mamba-2 layers, and the presets for a base model."""

from dataclasses import dataclass

from hylo_megatron.json_file import Dimension
from hylo_megatron.mixers.dimensions import Dimensions
from hylo_megatron.mixers.mixer import BaseHeads

NORM_EPS = 1e-5  # of the norm behind the scan: MambaMixer's own, whatever the model's rms_norm_eps


@dataclass(frozen=True)
class Mamba2Geometry(Dimensions):
    """Mamba-2; B and C have ``num_groups`` groups of ``state_size``, x has ``num_heads`` heads of ``head_dim``."""

    num_heads: Dimension
    head_dim: Dimension
    state_size: Dimension
    num_groups: Dimension
    conv_kernel: Dimension = 4


CONFIG_FIELDS = {  # fields of config.json
    "mamba_num_heads": "num_heads",
    "mamba_head_dim": "head_dim",
    "mamba_state_size": "state_size",
    "mamba_num_groups": "num_groups",
    "mamba_conv_kernel": "conv_kernel",
}
CONFIG_DEFAULTS = Mamba2Geometry(num_heads=9, head_dim=64, state_size=64, num_groups=9)
SHRUNK_BY = dict.fromkeys(("num_heads", "head_dim", "state_size", "num_groups"), "heads")


def native(base: BaseHeads) -> Mamba2Geometry:
    """Return one group a head, and heads like the base model's."""
    return Mamba2Geometry(
        num_heads=base.num_heads, head_dim=base.head_dim, state_size=base.head_dim, num_groups=base.num_heads
    )


def published(base: BaseHeads) -> Mamba2Geometry:
    """Return the dimensions of the method's paper: as many heads of the base model's width as the model is wide."""
    heads = base.hidden_size // base.head_dim
    return Mamba2Geometry(num_heads=heads, head_dim=base.head_dim, state_size=base.head_dim, num_groups=heads)


def check(head_dim: int, mamba2: Mamba2Geometry) -> None:
    """Accept all dimensions: Mamba-2's kernels take any."""
