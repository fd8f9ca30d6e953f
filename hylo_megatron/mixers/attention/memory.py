"""Bytes of softmax attention. No torch."""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.memory import Share, rotary_table

UNSPLIT = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def cached_values(arch: Architecture) -> int:
    return 2 * arch.num_key_value_heads * arch.head_dim


def tables(arch: Architecture, at: Share) -> int:
    """Return bytes of cosines and sines, fp32."""
    return rotary_table(arch.head_dim, at)
