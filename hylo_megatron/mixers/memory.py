"""Units in which mixers give the planner their bytes. No torch.

A mixer's ``memory.py`` has

    UNSPLIT          ends of the names of its weights that every tensor-parallel rank has in full; all others are split
    activations      bytes of one layer in training
    tables           bytes that all layers of a model share in training (not linear blocks)
    cached_values    values that one more token adds to a layer's cache (not linear blocks)
    state            linear blocks: values of the convolution's window and of the recurrent state of one request

Attention has only UNSPLIT and ``cached_values``, because no student trains it.

Activations are counted in bf16, with the kernels of a GPU. Every term is a tensor that an autograd function of the
layer saves: ``kernels/fused.py`` and ``triton_*.py``, fla 0.6.0's ``ChunkGatedDeltaRuleFunction``,
``LayerNormGatedFunction`` and ``SwiGLUFunction``, torch's flash attention, megatron's linear layers (which save their
input where their weight is trained).
"""

from dataclasses import dataclass, replace

from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import ParallelLayout


@dataclass(frozen=True)
class Share:
    """What one rank has of a micro-batch. ``length``: positions of a sequence on this rank.

    ``segment``: positions of a row that a recurrence reads at once (None: all).
    """

    layout: ParallelLayout
    sequences: int
    length: int
    segment: int | None = None

    @property
    def at_once(self) -> "Share":
        """Return what a recurrence reads at once.

        A rank has two rows of a sequence where states pass between ranks; an all-to-all gives it some heads of all of
        the sequence's positions.
        """
        if self.segment is None:
            return self
        own = 2 * self.segment if self.layout.passes_states else self.segment // self.layout.cp
        return replace(self, length=min(self.length, own))

    def in_segments(self, work: float, joining: float, copied: float) -> int:
        """Return bytes that the backward pass of a recurrence works in, from widths in values a token.

        With segments ``work`` counts for one of them, or ``joining`` for all where their gradients are joined.
        Segments of several rows are ``copied``.
        """
        if self.at_once.length == self.length:
            return self.inner(work)
        most = max(self.at_once.inner(work), self.inner(joining))
        return most + (self.inner(copied) if self.sequences > 1 or self.layout.passes_states else 0)

    @property
    def tokens(self) -> int:
        return self.sequences * self.length

    def inner(self, width: float) -> int:
        """Return bytes of a bf16 tensor of ``width`` values a token, which tensor parallelism has split."""
        return int(2 * self.tokens * width)

    def outer(self, width: int) -> int:
        """Return bytes of a bf16 tensor between layers, which only sequence parallelism splits."""
        return self.inner(width) // (self.layout.tp if self.layout.sequence_parallel else 1)

    def states(self, size: int) -> int:
        """Return bytes of an fp32 matrix of ``size`` values for each of a rank's two chunks of each sequence."""
        return 4 * 2 * self.sequences * size


@dataclass(frozen=True)
class SubLayer:
    """Bytes of a sub-layer: a mixer or an MLP with its norm, which megatron-core counts and recomputes as a layer.

    ``kept``: from the forward to the backward pass. ``work``: what the backward pass needs beside it. ``entry``: the
    input, all that is kept where the sub-layer is recomputed.
    """

    kept: int
    work: int
    entry: int


def aligned(width: int) -> int:
    """Return the width of a projection of ``AlignedColumnParallelLinear``: a multiple of 16."""
    return -(-width // 16) * 16


def projection(width: int, arch: Architecture, at: Share) -> int:
    """Return bytes that an aligned projection of ``width`` a rank keeps: its output, and the copy of its weight that
    ends in zeros. The all-to-all takes the output without zeros."""
    if at.layout.cp > 1 and not at.layout.passes_states:
        return at.inner(width)
    return at.inner(aligned(width)) + (2 * aligned(width) * arch.hidden_size if width % 16 else 0)


def delta_rule_states(heads: int, key: int, value: int, at: Share) -> int:
    """Return bytes that the delta rule keeps for states that pass between ranks.

    K more values a head come out as ``read``. Beside them are states of the rank's own chunks and transfers of others.
    """
    others = (2 * at.layout.cp - 1) / 2
    return at.inner(2 * heads * key) + at.states(int(heads * key * (key + 2.5 * value + others * key)))
