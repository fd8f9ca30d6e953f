"""Bytes of Gated DeltaNet. No torch."""

from hylo_megatron.config import Architecture
from hylo_megatron.config.decisions import CHUNK
from hylo_megatron.mixers.gdn.geometry import GDNGeometry
from hylo_megatron.mixers.memory import Share, SubLayer, delta_rule_states, projection

UNSPLIT = ("mixer.o_norm.weight",)


def state(g: GDNGeometry) -> tuple[int, int]:
    """Return values of one layer and request: the convolution's window, and the recurrent state."""
    channels = 2 * g.num_key_heads * g.key_head_dim + g.num_value_heads * g.value_head_dim
    return channels * (g.conv_kernel - 1), g.num_value_heads * g.key_head_dim * g.value_head_dim


def activations(arch: Architecture, at: Share) -> SubLayer:
    """Return bytes of one layer. Legend: M key heads, H value heads, K key dim, V value dim.

    Kept in bf16 are the normed x, the projection, fla's q, k, v and triangular inverses (64 values a token and head),
    output, gate, gated output and beta; in fp32 the decay in three forms and three norms' statistics; and the copy of
    the projection's weight that is padded to a multiple of 16 rows.
    """
    g, tp, d = arch.geometry.gdn, at.layout.tp, arch.hidden_size
    m, h, k, v = g.num_key_heads // tp, g.num_value_heads // tp, g.key_head_dim, g.value_head_dim
    kept = at.outer(d) + projection(2 * m * k + 2 * h * v + 2 * h, arch, at)
    kept += at.inner(2 * m * k + 4 * h * v + CHUNK * h)
    kept += at.inner(h + 2 * (4 * h + 2 * m))  # beta; decay in three forms, three statistics
    if at.layout.passes_states:
        kept += delta_rule_states(h, k, v, at)
    # states and their gradients; dq, dk, dv, w, u, .. Where states pass between ranks, values have K more columns.
    wide = v + k if at.layout.passes_states else v
    work = at.in_segments(2 * h * k * wide / CHUNK + 4 * h * wide + 4 * h * k, 2 * m * k + 2 * h * v + 6 * h, h * v)
    if at.layout.cp > 1 and not at.layout.passes_states:
        # In the forward pass the all-to-all copies the output, while megatron-core still has the convolution's.
        work = max(work, at.inner(2 * m * k + 4 * h * v))
    return SubLayer(kept, work, at.outer(d))
