"""Bytes that a rank sends in a training step, by the group of ranks that it sends them to. No torch in here.

Counted are activations and states of layers, embedding and head, states between pipeline stages, gradients and
parameters. Single values, such as norms of gradients and counts of tokens, are left out, and so is megatron-core's
padding of gradient buffers. ``tests/planner/test_sent.py`` compares with what megatron-core sends.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

from hylo_megatron.config import Architecture
from hylo_megatron.config.positions import has_window
from hylo_megatron.mixers import FP32_SUFFIXES, MIXERS, window
from hylo_megatron.mixers.memory import Share
from hylo_megatron.mixers.sent import ELEMENT, Exchange
from hylo_megatron.planner.training import PlannedRun, stage_elements
from hylo_megatron.planner.weights import EMBEDDING, HEAD, WHOLE

GRADIENT = 4  # bytes
SOFTMAX = 6 * 4  # bytes of a token's maxima, sums, divergence and logit, which ranks with parts of the vocabulary sum


@dataclass(frozen=True, kw_only=True)
class Sent:
    """Bytes of one step. ``behind`` is the part of ``cp`` that arrives while a rank attends to its own tokens.

    ``embedding`` has tied embeddings, which the first and the last pipeline stage sum. ``dp`` is among all ranks with
    the same parameters, those of context parallelism too.
    """

    tp: float = 0
    cp: float = 0
    pp: float = 0
    embedding: float = 0
    dp: float = 0
    behind: float = 0


class _Part(NamedTuple):
    """A part of a model, and how often its forward and backward pass run in a micro-batch."""

    exchange: Exchange
    at: Share
    forward: int
    backward: int


def _layers(run: PlannedRun, arch: Architecture, at: Share, layers: range, again: set[int]) -> Iterator[_Part]:
    """Yield mixers, windows and MLPs. ``again``: numbers of the sub-layers that are computed twice."""
    trained, mlp = arch is run.student, Exchange(copied=arch.hidden_size, rows=arch.hidden_size)
    for place, layer in enumerate(layers):
        kind, (first, second) = arch.plan[layer], (1 + (2 * place + step in again) for step in (0, 1))
        yield _Part(MIXERS[kind].part("sent").exchange(arch, at), at, first, trained)
        if has_window(arch.window, kind):
            yield _Part(window.exchange(arch, at), at, first, trained)
        yield _Part(mlp, at, second, trained)


def _parts(run: PlannedRun, stage: int) -> Iterator[_Part]:
    """Yield the parts of both models on a pipeline stage."""
    pp, share, student = run.layout.pp, run.share, run.student
    taught = replace(share, length=run.taught // share.sequences)
    layers = student.plan.stages(pp)[stage]
    again = {index for chunk in run.recomputed(2 * len(layers)) for index in chunk}
    yield from _layers(run, student, share, layers, again)
    yield from _layers(run, run.teacher, taught, run.teacher.plan.stages(pp)[stage], set())
    if stage == 0:  # embeddings
        yield _Part(Exchange(rows=run.teacher.hidden_size), taught, 1, 0)
        if not run.kind.layerwise:
            yield _Part(Exchange(rows=student.hidden_size), share, 1, run.trains(EMBEDDING))
    if stage == pp - 1 and not run.kind.layerwise:  # heads
        yield _Part(Exchange(whole=run.teacher.hidden_size), taught, 1, 0)
        yield _Part(Exchange(whole=student.hidden_size), share, 1, 1)


def _of_micro_batch(run: PlannedRun, stage: int) -> Sent:
    tp = cp = behind = 0.0
    for part in _parts(run, stage):
        split = part.exchange.tensor_parallel(part.at, run.train == "all")
        tp += part.forward * split.forward + part.backward * split.backward
        waited, hidden = (
            part.forward * passes.forward + part.backward * passes.backward
            for passes in (part.exchange.waited, part.exchange.behind)
        )
        cp, behind = cp + waited + hidden, behind + hidden
    last = stage == run.layout.pp - 1
    if last and not run.kind.layerwise:
        tp += 2 * (run.layout.tp - 1) / run.layout.tp * SOFTMAX * run.share.tokens
    return Sent(tp=tp, cp=cp, pp=_between_stages(run, stage, last), behind=behind)


def _between_stages(run: PlannedRun, stage: int, last: bool) -> int:
    """Return the bytes of hidden states, and of gradients by them (``distill/payload.py``)."""
    if run.kind.layerwise:  # the teacher's states only, and no gradient
        return run.share.outer(run.teacher.hidden_size) * (not last)
    return run.share.outer(run.teacher.hidden_size + run.student.hidden_size) * ((not last) + (stage > 0))


def sent(run: PlannedRun, stage: int = 0) -> Sent:
    """Return the bytes that a rank of pipeline stage ``stage`` sends in a step.

    Gradients of all micro-batches are added up on each rank, and sent once.
    """
    layout, each = run.layout, _of_micro_batch(run, stage)
    found = stage_elements(run, run.student, stage)
    trained = {name: count for name, count in found.items() if run.trains(name)}
    sharers, ends = run.work.processes // (layout.tp * layout.pp), (0, layout.pp - 1)
    parameters = sum(count * (4 if name.endswith(FP32_SUFFIXES) else ELEMENT) for name, count in trained.items())
    whole = sum(count for name, count in trained.items() if name.endswith(WHOLE)) if layout.sequence_parallel else 0
    tied = layout.pp > 1 and stage in ends and run.student.tie_word_embeddings
    embedding = trained.get(EMBEDDING if stage == 0 else HEAD, 0) if tied else 0
    times = run.micro_batches
    return Sent(
        tp=times * each.tp + 2 * (layout.tp - 1) / layout.tp * GRADIENT * whole,
        cp=times * each.cp, behind=times * each.behind, pp=times * each.pp, embedding=GRADIENT * embedding,
        dp=(sharers - 1) / sharers * (GRADIENT * sum(trained.values()) + parameters),
    )  # fmt: skip
