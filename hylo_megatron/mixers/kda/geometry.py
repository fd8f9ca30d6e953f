"""Dimensions of Kimi Delta Attention layers, and the presets for a base model."""

from dataclasses import dataclass

from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import Dimension, Positive
from hylo_megatron.mixers.dimensions import WIDEST_HEAD, Dimensions
from hylo_megatron.mixers.gdn.geometry import native as native_gdn
from hylo_megatron.mixers.mixer import BaseHeads


@dataclass(frozen=True)
class KDAGeometry(Dimensions):
    """Kimi Delta Attention; each head has its own query, key and value of ``head_dim``, and a square state.

    Decay and output gate come through a bottleneck of ``head_dim``. ``norm_eps`` is that of the norm behind the
    recurrence (None: the model's ``rms_norm_eps``).
    """

    num_heads: Dimension
    head_dim: Dimension
    conv_kernel: Dimension = 4
    norm_eps: Positive | None = None


CONFIG_FIELDS = {  # fields of config.json
    "kda_num_heads": "num_heads",
    "kda_head_dim": "head_dim",
    "kda_conv_kernel": "conv_kernel",
    "kda_norm_eps": "norm_eps",
}
CONFIG_DEFAULTS = KDAGeometry(num_heads=18, head_dim=64)
SHRUNK_BY = {"head_dim": "heads"}


def native(base: BaseHeads) -> KDAGeometry:
    """Return as many heads as Gated DeltaNet's native preset has value heads.

    States are as large then. Parameters are as many but for the bottlenecks: queries and keys of twice as many heads
    take the place of a full-rank output gate. The calibrated start needs the heads in pairs.
    """
    return KDAGeometry(num_heads=native_gdn(base).num_value_heads, head_dim=base.head_dim)


def published(base: BaseHeads) -> KDAGeometry:
    """Return the native dimensions: the method's paper has no Kimi Delta Attention."""
    return native(base)


def check(head_dim: int, kda: KDAGeometry) -> None:
    """Raise ``HyLoError`` for dimensions that the kernels of Kimi Delta Attention on a GPU do not run."""
    if kda.head_dim % 2 or kda.head_dim > WIDEST_HEAD:
        raise HyLoError(
            f"Kimi Delta Attention's heads of {kda.head_dim} dimensions: its kernels take even sizes up to"
            f" {WIDEST_HEAD}; use --geometry native"
        )
