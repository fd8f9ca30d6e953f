"""Decisions that the trainer carries out and the planner counts with, each made in one place. No torch in here.

Names are those of parameters, in Megatron's or in Hugging Face's spelling. What a kind of stage trains and how it is
scheduled is in ``stages.py``, how layers are split over pipeline stages in ``plan.py``, who passes states between
context-parallel ranks in ``layout.py``, and which parameters stay fp32 in ``mixers/registry.py``.
"""

from hylo_megatron.mixers.registry import HOLDERS

CHUNK = 64  # positions that the kernels of linear blocks work on at once

INITIAL_STATES = ("zero", "random", "carried")  # choices of --hylo-initial-states

_MIXER_MODULES = tuple(f".{holder}." for holder in HOLDERS)


def is_new(name: str) -> bool:
    """Whether a student's parameter belongs to a new mixer. Every other parameter is a copy of the base model's."""
    return any(module in name for module in _MIXER_MODULES)


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
