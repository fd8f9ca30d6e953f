"""Decisions that the trainer carries out and the planner counts with, each made in one place. No torch in here.

Names are those of parameters, in Megatron's or in Hugging Face's spelling. What a kind of stage trains and how it is
scheduled is in ``stages.py``, how layers are split over pipeline stages in ``plan.py``, who passes states between
context-parallel ranks in ``layout.py``, and which parameters stay fp32 in ``mixers/registry.py``.
"""

from hylo_megatron.mixers.registry import HOLDERS, WINDOW, WINDOW_GATE

CHUNK = 64  # positions that the kernels of linear blocks work on at once
# Values of gate and up of an MLP on a rank: up to the first it runs whole, beyond in blocks of at most the second.
WHOLE_MLP, BLOCK_OF_MLP = 2**29, 2**28

GATHERED = 2 << 30  # bytes that a context-parallel rank gathers, or makes of what it gathered, at one time

INITIAL_STATES = ("zero", "random", "carried")  # choices of --hylo-initial-states

_MIXER_MODULES = tuple(f".{holder}." for holder in HOLDERS)


def is_new(name: str) -> bool:
    """Whether a student's parameter belongs to a new mixer. Every other parameter is a copy of the base model's."""
    copied = WINDOW in name and WINDOW_GATE not in name
    return not copied and any(module in name for module in _MIXER_MODULES)


def taught_length(length: int, teacher_length: int | None, shared: bool) -> int:
    """Number of first tokens of a sequence that the teacher reads.

    The teacher reads all ``length`` tokens where ``--hylo-teacher-length`` is not given, and where ranks or pipeline
    stages share a sequence (``shared``).
    """
    return length if shared or not teacher_length else min(length, teacher_length)


def token_chunks(tokens: int, taught: int, chunk: int) -> list[tuple[slice, bool]]:
    """Chunks of tokens whose logits are in memory at once, and whether the teacher has read them (the first
    ``taught`` tokens). No chunk has tokens of both sorts."""
    cuts = [*range(0, taught, chunk), *range(taught, tokens, chunk), tokens]
    return [(slice(a, b), a < taught) for a, b in zip(cuts, cuts[1:], strict=False) if b > a]


def mlp_rows(rows: int, tokens: int, width: int, block: int | None = None) -> int:
    """Return how many of ``rows`` an MLP whose values are not kept computes at once (``layers/mlp.py``).

    A row has ``tokens`` tokens: one of each sequence, from all ranks that sequence parallelism gathers. ``width``: of
    gate and up on a rank. ``block``: tokens of a block, None for automatic blocks.
    """
    if block is None:
        most = max(1, BLOCK_OF_MLP // width // 1024) * 1024  # whole tiles of a matrix product
        block = rows * tokens if rows * tokens * width <= WHOLE_MLP else most
    return min(rows, max(1, block // tokens))


def goes_round(mode: str | None, ranks: int, held: int) -> bool:
    """Whether attention passes the tensors of ``ranks``, of ``held`` bytes each, round a ring; else it gathers them.

    ``mode``: --cp-comm-type. ``auto``, or None, gathers unless all tensors together are large; two ranks hold both
    tensors either way.
    """
    return mode == "p2p" or (mode != "all_gather" and ranks > 2 and ranks * held > GATHERED)
