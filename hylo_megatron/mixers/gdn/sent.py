"""What the ranks that share a Gated DeltaNet layer send each other. No torch."""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.memory import Share
from hylo_megatron.mixers.sent import Exchange, LinearBlock


def exchange(arch: Architecture, at: Share) -> Exchange:
    g, d = arch.geometry.gdn, arch.hidden_size
    keys, values = g.num_key_heads * g.key_head_dim, g.num_value_heads * g.value_head_dim
    block = LinearBlock(
        heads=g.num_value_heads, channels=2 * (keys + values + g.num_value_heads), convolved=2 * keys + values,
        outputs=values, state=g.key_head_dim * g.value_head_dim, transfer=g.key_head_dim**2, taps=g.conv_kernel,
    )  # fmt: skip
    return Exchange(columns=d, rows=d, waited=block.waited(at))
