"""Geometry of the mixers: explicit numbers, and the presets that fill them in for a base model."""

from dataclasses import asdict, dataclass
from typing import ClassVar

from pydantic import ConfigDict

from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import Dimension, PartDimension, Positive, check


class _Known:
    """Dimensions that are read from files: no others beside them."""

    __pydantic_config__: ClassVar = ConfigDict(extra="forbid")


@dataclass(frozen=True)
class MLAGeometry(_Known):
    """Multi-head latent attention; one cached row holds ``kv_lora_rank + qk_rope_head_dim`` values."""

    kv_lora_rank: Dimension
    qk_nope_head_dim: PartDimension
    qk_rope_head_dim: Dimension
    v_head_dim: Dimension
    q_lora_rank: Dimension | None = None


@dataclass(frozen=True)
class GDNGeometry(_Known):
    """Gated DeltaNet; each key head serves ``num_value_heads / num_key_heads`` value heads; state K x V each.

    ``norm_eps``: of the norm behind the recurrence; None: the model's ``rms_norm_eps``.
    """

    num_key_heads: Dimension
    num_value_heads: Dimension
    key_head_dim: Dimension
    value_head_dim: Dimension
    conv_kernel: Dimension = 4
    norm_eps: Positive | None = None


@dataclass(frozen=True)
class Mamba2Geometry(_Known):
    """Mamba-2; B and C have ``num_groups`` groups of ``state_size``, x has ``num_heads`` heads of ``head_dim``."""

    num_heads: Dimension
    head_dim: Dimension
    state_size: Dimension
    num_groups: Dimension
    conv_kernel: Dimension = 4


@dataclass(frozen=True)
class Geometry(_Known):
    mla: MLAGeometry
    gdn: GDNGeometry
    mamba2: Mamba2Geometry

    def to_dict(self) -> dict:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict, where: str = "geometry") -> "Geometry":
        return check(values, cls, where)


# (hidden size, attention heads, head dim) -> MLA dimensions of the method's paper (arXiv 2604.24715, appendix).
_PUBLISHED_MLA = {
    (2048, 32, 64): MLAGeometry(128, 32, 32, 64, q_lora_rank=1344),
    (3072, 24, 128): MLAGeometry(128, 64, 64, 128, q_lora_rank=1536),
    (2048, 16, 128): MLAGeometry(256, 64, 64, 128, q_lora_rank=1344),
}
# (hidden size, attention heads, head dim) -> GDN heads of 256.
_PUBLISHED_GDN_HEADS = {(2048, 32, 64): 6, (3072, 24, 128): 9, (2048, 16, 128): 6}


WIDEST_ROPE, NARROWEST_ROPE = 64, 16  # rotary dimensions: what engines cache beside a latent; less is hardly any
WIDEST_NOPE = 192  # beside a rotary part, in flash attention
WIDEST_HEAD = 256  # of flash attention, and of the kernels of Gated DeltaNet


def rotary_width(head_dim: int) -> int:
    """Rotary dimensions of a native MLA layer: the widest whose frequencies are all among the head's.

    Pairs of a width that divides the head dimension turn as evenly spaced pairs of the head do. Raises ``HyLoError``.
    """
    if head_dim % 2 or head_dim < 2:
        raise HyLoError(f"head_dim {head_dim}: rotary embeddings turn pairs, expected an even number")
    if head_dim > WIDEST_HEAD:
        raise HyLoError(
            f"head_dim {head_dim}: kernels of attention and Gated DeltaNet take at most {WIDEST_HEAD};"
            " take a base model with narrower heads"
        )
    if head_dim <= WIDEST_ROPE:
        return head_dim
    width = max(w for w in range(2, WIDEST_ROPE + 1, 2) if head_dim % w == 0)
    if width < NARROWEST_ROPE:
        raise HyLoError(
            f"head_dim {head_dim}: MLA needs an even rotary width from {NARROWEST_ROPE} to {WIDEST_ROPE} that divides"
            f" it, and the widest is {width}; take a base model with another head dimension (all multiples of 8 fit)"
        )
    return width


def _native(hidden: int, heads: int, head_dim: int) -> Geometry:
    """What serving engines run without padding, for heads of 64 and 128: latent 256+64, K = V, two value heads a key
    head. Other heads get the widest rotary part that divides them; GPU kernels pad that to 64."""
    key_heads = max(1, hidden // head_dim)
    gdn_heads = key_heads if head_dim == 64 else max(1, round(0.75 * hidden / head_dim))
    rope = rotary_width(head_dim)
    # narrow heads have every pair in both parts, others in one of the two
    nope = head_dim if head_dim <= WIDEST_ROPE else min(WIDEST_NOPE, head_dim - rope)
    return Geometry(
        MLAGeometry(min(256, 2 * heads * head_dim), nope, rope, head_dim),
        GDNGeometry(gdn_heads, 2 * gdn_heads, head_dim, head_dim),
        Mamba2Geometry(heads, head_dim, head_dim, heads),
    )


def check_heads(head_dim: int, geometry: Geometry, kinds: set[str]) -> None:
    """Raises ``HyLoError`` for mixers of ``kinds`` that a base model with heads of ``head_dim`` cannot become, or that
    kernels of Gated DeltaNet on a GPU do not run."""
    mla, gdn = geometry.mla, geometry.gdn
    if "mla" in kinds:
        if mla.qk_rope_head_dim % 2 or mla.qk_rope_head_dim < 2 or head_dim % mla.qk_rope_head_dim:
            raise HyLoError(
                f"qk_rope_head_dim {mla.qk_rope_head_dim} must divide the head dimension {head_dim} and be even:"
                f" frequencies would not match; --geometry native takes {rotary_width(head_dim)}"
            )
        if mla.qk_nope_head_dim % 2 or mla.qk_nope_head_dim > head_dim:
            raise HyLoError(
                f"qk_nope_head_dim {mla.qk_nope_head_dim} must be even and at most the head dimension {head_dim}"
            )
    odd = gdn.key_head_dim % 2 or gdn.value_head_dim % 2  # fla refuses them in its backward pass: Triton's tails
    if "gdn" in kinds and (odd or gdn.key_head_dim > WIDEST_HEAD):
        raise HyLoError(
            f"Gated DeltaNet's heads of {gdn.key_head_dim} key and {gdn.value_head_dim} value dimensions: its kernels"
            f" take even sizes and at most {WIDEST_HEAD} key dimensions; use --geometry native"
        )


def _published(hidden: int, heads: int, head_dim: int) -> Geometry:
    key = (hidden, heads, head_dim)
    if key not in _PUBLISHED_MLA:
        known = ", ".join(f"d {d} with {h} heads of {k}" for d, h, k in _PUBLISHED_MLA)
        raise HyLoError(
            f"--geometry published: no published dimensions for d {hidden} with {heads} heads of {head_dim}"
            f" (there are for {known}); use --geometry native"
        )
    gdn_heads = _PUBLISHED_GDN_HEADS[key]
    return Geometry(
        _PUBLISHED_MLA[key],
        GDNGeometry(gdn_heads, gdn_heads, 256, 512),
        Mamba2Geometry(hidden // head_dim, head_dim, head_dim, hidden // head_dim),
    )


def geometry_preset(name: str, hidden_size: int, num_attention_heads: int, head_dim: int) -> Geometry:
    """``native`` (default) or ``published`` geometry for a base model's dimensions."""
    presets = {"native": _native, "published": _published}
    if name not in presets:
        raise HyLoError(f"--geometry {name!r}: expected one of {', '.join(presets)}")
    return presets[name](hidden_size, num_attention_heads, head_dim)
