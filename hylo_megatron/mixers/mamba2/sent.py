"""What the ranks that share a Mamba-2 layer send each other. No torch."""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.memory import Share
from hylo_megatron.mixers.sent import Exchange, LinearBlock


def exchange(arch: Architecture, at: Share) -> Exchange:
    g, d = arch.geometry.mamba2, arch.hidden_size
    values, shared = g.num_heads * g.head_dim, 2 * g.num_groups * g.state_size
    block = LinearBlock(
        heads=g.num_heads, channels=2 * values + shared + g.num_heads, convolved=values + shared, outputs=values,
        state=g.head_dim * g.state_size, transfer=1, taps=g.conv_kernel,
    )  # fmt: skip
    return Exchange(columns=d, rows=d, waited=block.waited(at))
