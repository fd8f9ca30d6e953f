"""Bytes of MLA. No torch."""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.memory import Share, SubLayer
from hylo_megatron.mixers.mla.geometry import MLAGeometry

UNSPLIT = (
    "self_attn.q_norm.weight",
    "self_attn.k_norm.weight",
    "self_attn.q_a_proj.weight",
    "self_attn.kv_a_proj_with_mqa.weight",
)


def row_values(mla: MLAGeometry) -> int:
    """Return the values of one row of a cache of latents."""
    return mla.kv_lora_rank + mla.qk_rope_head_dim


def cached_values(arch: Architecture) -> int:
    return row_values(arch.geometry.mla)


def tables(arch: Architecture, at: Share) -> int:
    """Return bytes of the tables by position: fp32 cosines and sines of half the rotary dimensions, query scales."""
    rotary = arch.geometry.mla.qk_rope_head_dim if arch.mla_rope else 0
    return 4 * at.length * (rotary + bool(arch.log_scale))


def activations(arch: Architecture, at: Share) -> SubLayer:
    """Return bytes of one layer.

    Kept are the normed x, latents, queries, keys, values padded to the keys' width, and outputs with their fp32
    denominators. Values as wide as keys stay views of the projection; outputs are views of what attention returns.
    """
    g, heads, d = arch.geometry.mla, arch.num_attention_heads // at.layout.tp, arch.hidden_size
    key = g.qk_nope_head_dim + g.qk_rope_head_dim
    before_norm = at.inner(heads * key + 2 * heads) if arch.mla_qk_norm else 0  # with the norm's statistics
    kept = at.outer(d + (g.q_lora_rank or 0)) + at.inner(heads * (key + g.v_head_dim) + 2 * heads) + before_norm
    if at.layout.cp > 1:  # keys and values are made again of the latents of all ranks
        padded = heads * key if g.v_head_dim < key else 0  # outputs as wide as keys, beside those without padding
        kept += at.inner(at.layout.cp * (g.kv_lora_rank + g.qk_rope_head_dim) + padded)
    else:
        values = 2 * key if g.v_head_dim < key else g.qk_nope_head_dim + g.v_head_dim
        kept += at.outer(g.kv_lora_rank) + at.inner(heads * (key + values)) + before_norm
    return SubLayer(kept, at.inner(4 * heads * key), at.outer(d))
