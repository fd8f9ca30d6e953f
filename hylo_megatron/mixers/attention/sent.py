"""What the ranks that share a softmax attention layer, which only teachers have, send each other. No torch."""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.memory import Share
from hylo_megatron.mixers.sent import Exchange, softmax


def exchange(arch: Architecture, at: Share) -> Exchange:
    keys_and_values = 2 * arch.num_key_value_heads * arch.head_dim // at.layout.tp
    return Exchange(copied=arch.hidden_size, rows=arch.hidden_size, **softmax(at, keys_and_values))
