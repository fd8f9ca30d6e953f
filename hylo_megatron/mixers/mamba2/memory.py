"""Bytes of Mamba-2. No torch."""

from hylo_megatron.config import Architecture
from hylo_megatron.config.decisions import CHUNK
from hylo_megatron.mixers.mamba2.geometry import Mamba2Geometry
from hylo_megatron.mixers.memory import Share, SubLayer, projection

UNSPLIT = ()


def state(g: Mamba2Geometry) -> tuple[int, int]:
    """Return values of one layer and request: the convolution's window, and the recurrent state."""
    inner = g.num_heads * g.head_dim
    return (inner + 2 * g.num_groups * g.state_size) * (g.conv_kernel - 1), inner * g.state_size


def activations(arch: Architecture, at: Share) -> SubLayer:
    """Return bytes of one layer. Legend: H heads, G groups, P head dim, N state.

    Kept are the normed x, the projection, z, x, x dt, B, C, the scan's output, gated and normed, and fp32 dt in three
    forms.
    """
    g, tp, d = arch.geometry.mamba2, at.layout.tp, arch.hidden_size
    h, groups, p, n = g.num_heads // tp, g.num_groups // tp, g.head_dim, g.state_size
    kept = at.outer(d) + projection(2 * h * p + 2 * groups * n + h, arch, at)
    kept += at.inner(6 * h * p + 2 * h * n) + at.inner(2 * (3 * h + groups))
    if at.layout.passes_states:
        kept += at.inner(groups * n + h * p + 2 * h) + at.states(int(1.5 * h * p * n))
    work = at.inner(2 * h * p * n / CHUNK + 2 * h * n + h * p)
    return SubLayer(kept, work, at.outer(d))
