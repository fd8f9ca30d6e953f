"""Bytes of Kimi Delta Attention. No torch."""

from hylo_megatron.config import Architecture
from hylo_megatron.config.decisions import CHUNK
from hylo_megatron.mixers.kda.geometry import KDAGeometry
from hylo_megatron.mixers.memory import Share, SubLayer, delta_rule_states, projection

UNSPLIT = ("mixer.o_norm.weight", "mixer.f_a_proj.weight", "mixer.g_a_proj.weight")


def state(g: KDAGeometry) -> tuple[int, int]:
    """Return values of one layer and request: the convolution's window, and the recurrent state."""
    return 3 * g.num_heads * g.head_dim * (g.conv_kernel - 1), g.num_heads * g.head_dim**2


def activations(arch: Architecture, at: Share) -> SubLayer:
    """Return bytes of one layer. Legend: H heads, K head dim.

    Kept are the normed x, the projection, both bottlenecks; of fla's ``ChunkKDAFunction`` q, k, v, what the decay is
    made from and two triangular matrices (64 values a token and head each); output, gate and gated output; beta and
    norms' statistics.
    """
    g, tp, d = arch.geometry.kda, at.layout.tp, arch.hidden_size
    h, k = g.num_heads // tp, g.head_dim
    kept = at.outer(d + 2 * k) + projection(3 * h * k + h, arch, at)
    kept += at.inner(7 * h * k + 2 * CHUNK * h)
    kept += at.inner(h + 2 * 3 * h)  # beta; three statistics
    if at.layout.passes_states:
        kept += delta_rule_states(h, k, k, at)
    # Counted in fla's backward pass: states and their gradients, triangular matrices with theirs, and as wide as the
    # heads what it makes again (w, u, decayed queries and keys, fp32 decays) beside gradients, some of them fp32.
    # Where states pass between ranks, values have K more columns.
    wide = 2 * k if at.layout.passes_states else k
    work = at.in_segments(2 * h * k * wide / CHUNK + 17 * h * k + 3 * h * wide + 4 * CHUNK * h, 4 * h * k, 2 * h * k)
    return SubLayer(kept, work, at.outer(d))
