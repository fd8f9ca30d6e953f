"""FLOPs of MLA beside the products with its weights. No torch."""

from hylo_megatron.config import Architecture


def mixing(arch: Architecture, length: int) -> int:
    """Return the FLOPs of a token in one layer: causal scores, and the sum of the values that they weigh."""
    g = arch.geometry.mla
    return length * arch.num_attention_heads * (g.qk_nope_head_dim + g.qk_rope_head_dim + g.v_head_dim)
