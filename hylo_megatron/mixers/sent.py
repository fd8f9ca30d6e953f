"""Units in which mixers give the planner what the ranks that share a layer send each other. No torch.

A mixer's ``sent.py`` has

    exchange    the ``Exchange`` of one layer

Bytes are those that one rank sends in a ring of all ranks, as ``engine/sent_bytes.py`` counts them, with activations
in bf16. Legend: T tokens of a rank, B sequences, n context-parallel ranks.
"""

from dataclasses import dataclass

from hylo_megatron.config.decisions import goes_round
from hylo_megatron.mixers.memory import Share

ELEMENT, STATE = 2, 4  # bytes of an activation; of a state, and of a gradient that travels round a ring


@dataclass(frozen=True, kw_only=True)
class Passes:
    """Bytes of the forward and of the backward pass."""

    forward: float = 0
    backward: float = 0

    def __add__(self, other: "Passes") -> "Passes":
        return Passes(forward=self.forward + other.forward, backward=self.backward + other.backward)


NOTHING = Passes()


@dataclass(frozen=True, kw_only=True)
class Exchange:
    """What one layer exchanges.

    The first four are for tensor parallelism, in values of a token: inputs of projections that ranks share, whose
    weights are new (``columns``) or copied from the base model (``copied``); other values of which each rank needs
    those of all tokens (``whole``); and outputs that are sums over the ranks (``rows``). The last two are bytes of
    context parallelism: those that a rank waits for, and those that arrive ``behind`` its attention to its own tokens.
    """

    columns: int = 0
    copied: int = 0
    whole: int = 0
    rows: int = 0
    waited: Passes = NOTHING
    behind: Passes = NOTHING

    def tensor_parallel(self, at: Share, copies_train: bool = True) -> Passes:
        """Return the bytes of tensor parallelism. A trained projection gathers its input again for its gradient."""
        tp = at.layout.tp
        value = ELEMENT * at.tokens * (tp - 1) / tp
        inputs = self.columns + self.copied + self.whole
        if not at.layout.sequence_parallel:  # sums over the ranks, which send each value twice
            return Passes(forward=2 * value * self.rows, backward=2 * value * inputs)
        again = self.columns + (self.copied if copies_train else 0)
        return Passes(forward=value * (inputs + self.rows), backward=value * (again + inputs + self.rows))


def softmax(at: Share, width: int) -> dict[str, Passes]:
    """Return what attention across ranks exchanges: ``width`` values of a token (``parallel/exchange.py``)."""
    ranks, held = at.layout.cp, ELEMENT * at.tokens * width
    others = (ranks - 1) * held
    if not others:
        return {}
    if goes_round(at.layout.exchange, ranks, held):
        return {"behind": Passes(forward=others, backward=others + ranks * held * STATE / ELEMENT)}
    return {"behind": Passes(forward=others), "waited": Passes(backward=others)}


@dataclass(frozen=True, kw_only=True)
class LinearBlock:
    """Sizes of a linear block, of all tensor-parallel ranks, that decide what it sends.

    ``channels`` are those that an all-to-all distributes, ``convolved`` those that the convolution of ``taps`` takes,
    ``outputs`` those of the mixer before its output projection. ``state`` and ``transfer`` are values of a head.
    """

    heads: int
    channels: int
    convolved: int
    outputs: int
    state: int
    transfer: int
    taps: int

    def waited(self, at: Share) -> Passes:
        """Return the bytes of states (``parallel/state_passing.py``), or of megatron-core's all-to-all."""
        ranks, tp = at.layout.cp, at.layout.tp
        if not at.layout.passes_states:
            both = (ranks - 1) / ranks * at.tokens * (self.channels + self.outputs) / tp * ELEMENT
            return Passes(forward=both, backward=both)
        chunks = 2 * at.sequences * (ranks - 1)
        taps = (self.taps - 1) * self.convolved * ELEMENT
        states, transfers = (self.heads * size * STATE for size in (self.state, self.transfer))
        return Passes(forward=chunks * (states + transfers + taps) / tp, backward=chunks * (states + taps) / tp)
