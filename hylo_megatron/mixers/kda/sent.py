"""What the ranks that share a layer of Kimi Delta Attention send each other. No torch."""

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.memory import Share
from hylo_megatron.mixers.sent import Exchange, LinearBlock


def exchange(arch: Architecture, at: Share) -> Exchange:
    """Both bottlenecks, of decay and gate, are gathered too; their wide sides go through the all-to-all."""
    g, d = arch.geometry.kda, arch.hidden_size
    width, square = g.num_heads * g.head_dim, g.head_dim**2
    block = LinearBlock(
        heads=g.num_heads, channels=5 * width + g.num_heads, convolved=3 * width, outputs=width, state=square,
        transfer=square, taps=g.conv_kernel,
    )  # fmt: skip
    return Exchange(columns=d + 2 * g.head_dim, rows=d, waited=block.waited(at))
