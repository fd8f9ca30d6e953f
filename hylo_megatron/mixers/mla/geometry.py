"""Dimensions of MLA layers, and the presets for a base model."""

from dataclasses import dataclass, replace

from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import Dimension, PartDimension
from hylo_megatron.mixers.dimensions import WIDEST_HEAD, Dimensions
from hylo_megatron.mixers.mixer import BaseHeads

WIDEST_ROPE = 64  # rotary dimensions that serving engines cache beside a latent
NARROWEST_ROPE = 16  # fewer rotary dimensions hold hardly any position
WIDEST_NOPE = 192  # beside a rotary part, in flash attention


@dataclass(frozen=True)
class MLAGeometry(Dimensions):
    """Multi-head latent attention; one cached row holds ``kv_lora_rank + qk_rope_head_dim`` values."""

    kv_lora_rank: Dimension
    qk_nope_head_dim: PartDimension
    qk_rope_head_dim: Dimension
    v_head_dim: Dimension
    q_lora_rank: Dimension | None = None


CONFIG_FIELDS = {  # fields of config.json, named as DeepSeek's
    "q_lora_rank": "q_lora_rank",
    "kv_lora_rank": "kv_lora_rank",
    "qk_nope_head_dim": "qk_nope_head_dim",
    "qk_rope_head_dim": "qk_rope_head_dim",
    "v_head_dim": "v_head_dim",
}
CONFIG_DEFAULTS = MLAGeometry(kv_lora_rank=256, qk_nope_head_dim=64, qk_rope_head_dim=64, v_head_dim=64)
SHRUNK_BY = dict.fromkeys(("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim"), "heads")
SHRUNK_BY["q_lora_rank"] = "width"


# (hidden size, attention heads, head dim) -> dimensions of the method's paper (arXiv 2604.24715, appendix), in order.
PUBLISHED = {
    (2048, 32, 64): MLAGeometry(128, 32, 32, 64, 1344),
    (3072, 24, 128): MLAGeometry(128, 64, 64, 128, 1536),
    (2048, 16, 128): MLAGeometry(256, 64, 64, 128, 1344),
}


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


def native(base: BaseHeads) -> MLAGeometry:
    """Return what serving engines run without padding for heads of 64 and 128: a latent of 256 + 64.

    Other heads get the widest rotary part that divides them; GPU kernels pad it to 64. Raises ``HyLoError``.
    """
    rope = rotary_width(base.head_dim)
    return MLAGeometry(
        kv_lora_rank=min(256, 2 * base.num_heads * base.head_dim),
        qk_nope_head_dim=_nope_width(base.head_dim, rope),
        qk_rope_head_dim=rope,
        v_head_dim=base.head_dim,
    )


def _nope_width(head_dim: int, rope: int) -> int:
    """Return the width beside a rotary part: narrow heads have every pair in both, wide ones in one of the two."""
    return head_dim if head_dim <= WIDEST_ROPE else min(WIDEST_NOPE, head_dim - rope)


def with_latent(mla: MLAGeometry, head_dim: int, rank: int, rope: int) -> MLAGeometry:
    """Return ``mla`` with another row in the cache, ``rank + rope`` values. ``check`` tells whether it fits."""
    nope = _nope_width(head_dim, min(rope, head_dim))
    return replace(mla, kv_lora_rank=rank, qk_rope_head_dim=rope, qk_nope_head_dim=nope)


def published(base: BaseHeads) -> MLAGeometry:
    """Return the dimensions of the method's paper. Raises ``HyLoError`` where it has none for this base model."""
    key = (base.hidden_size, base.num_heads, base.head_dim)
    if key not in PUBLISHED:
        known = ", ".join(f"d {d} with {h} heads of {k}" for d, h, k in PUBLISHED)
        raise HyLoError(
            f"--geometry published: no published dimensions for d {base.hidden_size} with {base.num_heads} heads of"
            f" {base.head_dim} (there are for {known}); use --geometry native"
        )
    return PUBLISHED[key]


def check(head_dim: int, mla: MLAGeometry) -> None:
    """Raise ``HyLoError`` for dimensions that a base model with heads of ``head_dim`` cannot become."""
    rope = mla.qk_rope_head_dim
    if rope % 2 or rope < 2 or head_dim % rope:
        raise HyLoError(
            f"qk_rope_head_dim {rope} must divide the head dimension {head_dim} and be even:"
            f" frequencies would not match; --geometry native takes {rotary_width(head_dim)}"
        )
    if mla.qk_nope_head_dim % 2 or mla.qk_nope_head_dim > head_dim:
        raise HyLoError(
            f"qk_nope_head_dim {mla.qk_nope_head_dim} must be even and at most the head dimension {head_dim}"
        )
