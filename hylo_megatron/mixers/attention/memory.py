"""Bytes of softmax attention. No torch."""

from hylo_megatron.config import Architecture

UNSPLIT = ("self_attn.q_norm.weight", "self_attn.k_norm.weight")


def cached_values(arch: Architecture) -> int:
    return 2 * arch.num_key_value_heads * arch.head_dim
