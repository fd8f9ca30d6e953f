"""FLOPs of softmax attention beside the products with its weights. No torch."""

from hylo_megatron.config import Architecture


def mixing(arch: Architecture, length: int) -> int:
    """Return the FLOPs of a token in one layer: causal scores, and the sum of the values that they weigh."""
    return length * arch.num_attention_heads * 2 * arch.head_dim
