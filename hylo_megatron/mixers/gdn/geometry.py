"""Dimensions of Gated DeltaNet layers, and the presets for a base model."""

from dataclasses import dataclass

from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import Dimension, Positive
from hylo_megatron.mixers.dimensions import WIDEST_HEAD, Dimensions
from hylo_megatron.mixers.mixer import BaseHeads


@dataclass(frozen=True)
class GDNGeometry(Dimensions):
    """Gated DeltaNet; each key head serves ``num_value_heads / num_key_heads`` value heads; state K x V each.

    ``norm_eps`` is that of the norm behind the recurrence (None: the model's ``rms_norm_eps``).
    """

    num_key_heads: Dimension
    num_value_heads: Dimension
    key_head_dim: Dimension
    value_head_dim: Dimension
    conv_kernel: Dimension = 4
    norm_eps: Positive | None = None


CONFIG_FIELDS = {  # fields of config.json, named as Qwen3-Next's
    "linear_num_key_heads": "num_key_heads",
    "linear_num_value_heads": "num_value_heads",
    "linear_key_head_dim": "key_head_dim",
    "linear_value_head_dim": "value_head_dim",
    "linear_conv_kernel_dim": "conv_kernel",
    "linear_norm_eps": "norm_eps",
}
CONFIG_DEFAULTS = GDNGeometry(num_key_heads=9, num_value_heads=18, key_head_dim=64, value_head_dim=64)
SHRUNK_BY = {"key_head_dim": "width", "value_head_dim": "width"}


# (hidden size, attention heads, head dim) -> heads, each of 256 key dimensions (arXiv 2604.24715, appendix).
PUBLISHED_HEADS = {(2048, 32, 64): 6, (3072, 24, 128): 9, (2048, 16, 128): 6}


def native(base: BaseHeads) -> GDNGeometry:
    """Return what serving engines run without padding: K = V, two value heads a key head."""
    if base.head_dim == 64:
        heads = max(1, base.hidden_size // base.head_dim)
    else:
        heads = max(1, round(0.75 * base.hidden_size / base.head_dim))
    return GDNGeometry(
        num_key_heads=heads, num_value_heads=2 * heads, key_head_dim=base.head_dim, value_head_dim=base.head_dim
    )


def published(base: BaseHeads) -> GDNGeometry:
    """Return the dimensions of the method's paper; ``mla.geometry.published`` refuses unknown base models."""
    heads = PUBLISHED_HEADS[base.hidden_size, base.num_heads, base.head_dim]
    return GDNGeometry(num_key_heads=heads, num_value_heads=heads, key_head_dim=256, value_head_dim=512)


def check(head_dim: int, gdn: GDNGeometry) -> None:
    """Raise ``HyLoError`` for dimensions that the kernels of Gated DeltaNet on a GPU do not run."""
    odd = gdn.key_head_dim % 2 or gdn.value_head_dim % 2  # fla refuses them in its backward pass: Triton's tails
    if odd or gdn.key_head_dim > WIDEST_HEAD:
        raise HyLoError(
            f"Gated DeltaNet's heads of {gdn.key_head_dim} key and {gdn.value_head_dim} value dimensions: its kernels"
            f" take even sizes and at most {WIDEST_HEAD} key dimensions; use --geometry native"
        )
