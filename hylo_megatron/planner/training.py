"""Peak memory of a training run on each pipeline stage: weights, activations and the fullest moment of a step.

Sub-layers (mixers and MLPs) are what megatron counts and recomputes as layers. Legend: D student width, C teacher
width, T tokens of a rank, N vocabulary rows of a rank.
"""

from dataclasses import dataclass, replace

from hylo_megatron.config import Architecture
from hylo_megatron.config.decisions import taught_length
from hylo_megatron.config.layout import ParallelLayout, Work
from hylo_megatron.config.stages import StageKind
from hylo_megatron.convert.pair import padded_rows
from hylo_megatron.distill.losses import HeadShape, Loss
from hylo_megatron.mixers.memory import Share, SubLayer
from hylo_megatron.planner.activations import mixer as mixer_bytes
from hylo_megatron.planner.activations import mlp, mlp_block_by_block, one_block, tables, teacher_work
from hylo_megatron.planner.offload import in_fp8, streamed_teacher
from hylo_megatron.planner.weights import HEAD, Shards, Weights, rank_elements, weights

# cuBLAS gets 32 MiB from torch for each stream and thread that multiplies: the main thread and autograd's, each on the
# default stream and on the stream that a CUDA graph is captured on.
WORKSPACES = 4 * 32 * 2**20


@dataclass(frozen=True, kw_only=True)
class PlannedRun:
    """A run as its flags describe it.

    ``recompute`` is ``--recompute-num-layers`` of method block: the sub-layers of a pipeline stage that are computed
    twice, each apart. ``recompute_chunk`` is that of method uniform, which computes all sub-layers twice, so many at
    once. ``work.processes`` and the layout give the data-parallel size.
    """

    student: Architecture
    teacher: Architecture
    kind: StageKind
    loss: Loss
    layout: ParallelLayout
    work: Work
    train: str = "all"  # or "mixers"
    recompute: int = 0
    recompute_chunk: int = 0
    mlp_block: int | None = None  # --hylo-mlp-block
    recurrence_block: int | None = None  # --hylo-recurrence-block
    teacher_fp8: bool = False
    offload_teacher: bool = False
    offload_optimizer: bool = False

    @property
    def share(self) -> Share:
        length = self.work.seq_length // self.layout.cp
        return Share(self.layout, self.work.micro_batch, length, self.recurrence_block)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of a step on each rank."""
        data_parallel = self.work.processes // self.layout.ranks
        return max(1, self.work.global_batch // (self.work.micro_batch * data_parallel))

    @property
    def taught(self) -> int:
        """Tokens of a micro-batch that this rank's teacher reads."""
        shared = self.layout.cp > 1 or self.layout.pp > 1
        return self.share.sequences * taught_length(self.share.length, self.loss.teacher_reads, shared)

    @property
    def sub_layers(self) -> int:
        """Sub-layers of the pipeline rank that has the most."""
        return 2 * max(map(len, self.student.plan.stages(self.layout.pp)))

    @property
    def rows(self) -> int:
        """Rows of both heads on all tensor-parallel ranks, with padding."""
        return padded_rows(self.student, self.teacher, self.layout.tp)

    def recomputed(self, sub_layers: int) -> list[range]:
        """Return the chunks of a pipeline stage's sub-layers of which only the input is kept."""
        if self.kind.layerwise:
            return []
        if self.recompute_chunk:
            starts = range(0, sub_layers, self.recompute_chunk)
            return [range(first, min(first + self.recompute_chunk, sub_layers)) for first in starts]
        return [range(index, index + 1) for index in range(min(self.recompute, sub_layers))]

    @property
    def frozen_windows(self) -> bool:
        """Whether nothing learns through the attention of windows, whose weights are copied."""
        return self.kind.layerwise and self.train == "mixers"

    def trains(self, name: str) -> bool:
        return self.kind.trains(name, self.train)


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes on a rank of one pipeline stage.

    ``loss`` and ``backward`` are needed beside the activations, the one while the loss is computed, the other in the
    fullest moment of the backward pass; only the larger one counts.
    """

    layers: range
    student: Weights
    teacher: int
    activations: int
    teacher_states: int
    loss: int
    backward: int
    workspaces: int = WORKSPACES

    @property
    def total(self) -> int:
        fixed = self.student.parameters + self.student.gradients + self.student.optimizer + self.teacher
        return fixed + self.activations + self.teacher_states + max(self.loss, self.backward) + self.workspaces


# ---- layers ----


def stage_sub_layers(run: PlannedRun, layers: range) -> list[SubLayer]:
    """Return mixer and MLP of each layer in turn.

    In a layer-wise kind of stage each mixer reads the teacher's hidden state, and both outputs are compared with the
    teacher's. Before the MLP's backward pass the comparisons have freed the MLP's output and the teacher's two states;
    in a pipeline the schedule keeps the teacher's.
    """
    sub_layers, at, copied = [], run.share, run.train == "all"
    hidden = at.outer(run.student.hidden_size)
    freed = hidden * (3 if run.layout.pp == 1 else 1)
    part = one_block(run.student, at, run.mlp_block)
    recomputed = sum(map(len, run.recomputed(2 * len(layers))))  # the first ones
    for layer in layers:
        mixer = mixer_bytes(run.student.plan[layer], run.student, at, run.frozen_windows)
        rest = mlp(run.student, at, copied)
        if part != at and len(sub_layers) + 1 < recomputed:
            rest = mlp_block_by_block(run.student, at, part, copied)
        if run.kind.layerwise:
            compared = hidden + at.outer(run.loss.values_kept)
            rest = replace(rest, kept=rest.kept + compared, work=rest.work - freed)
        elif run.loss.hidden_layers_weight:  # the teacher's state, and the difference in fp32
            rest = replace(
                rest, kept=rest.kept + at.outer(run.teacher.hidden_size) + at.inner(2 * run.student.hidden_size)
            )
        if not run.kind.layerwise:  # x, and its statistics where the norm's weight is not trained
            mixer = replace(mixer, kept=mixer.kept + hidden + (0 if copied else at.outer(2)))
        sub_layers += [mixer, rest]
    return sub_layers


def forward_bytes(sub_layers: list[SubLayer], recomputed: list[range]) -> int:
    """Return what a micro-batch keeps for the backward pass: of each recomputed chunk of sub-layers only the input."""
    again = sum(_again(sub_layers, chunk) for chunk in recomputed)
    return sum(sub_layer.kept for sub_layer in sub_layers) - again


def backward_bytes(sub_layers: list[SubLayer], recomputed: list[range]) -> int:
    """Return the most that the backward pass, from last to first sub-layer, needs beside ``forward_bytes``.

    The output of a chunk of several sub-layers is held beside the work of all but the last.
    """
    again = {chunk[-1]: _again(sub_layers, chunk) for chunk in recomputed}
    output = {index: sub_layers[chunk[-1]].entry for chunk in recomputed for index in chunk[:-1]}
    beside = most = 0
    for index in reversed(range(len(sub_layers))):
        beside += again.get(index, 0)
        most = max(most, beside + output.get(index, 0) + sub_layers[index].work)
        beside -= sub_layers[index].kept
    return most


def _again(sub_layers: list[SubLayer], chunk: range) -> int:
    """Return the bytes that a chunk of sub-layers keeps in its second run, beside its input."""
    return sum(sub_layers[index].kept for index in chunk) - sub_layers[chunk[0]].entry


# ---- pipeline ----


def warm_up(run: PlannedRun, pipeline_stage: int) -> int:
    """Return the micro-batches that a pipeline stage reads before its first backward pass.

    This is the 1F1B schedule's number. Layer-wise stages have a schedule without (``parallel/teacher_fed.py``).
    """
    return 0 if run.kind.layerwise else min(run.micro_batches, run.layout.pp - 1 - pipeline_stage)


def in_flight(run: PlannedRun, pipeline_stage: int) -> int:
    """Return the micro-batches whose activations a pipeline stage holds at once."""
    return min(run.micro_batches, warm_up(run, pipeline_stage) + 1)


def layer_states_bytes(run: PlannedRun, pipeline_stage: int, layers: range) -> int:
    """Return the bytes of the teacher's states in a layer-wise kind of stage.

    Counts the input of the first layer and the output of each sub-layer, of this micro-batch and of those that the
    teacher has read ahead. In a pipeline also the state that arrives for the next micro-batch, and the state after the
    final norm.
    """
    pp, last = run.layout.pp, run.layout.pp - 1
    tensors = (2 * len(layers) + 1) * (last - pipeline_stage + 1)
    tensors += (pipeline_stage > 0) + (pp > 1 and pipeline_stage == last)
    return run.share.outer(run.teacher.hidden_size) * tensors


def payload_bytes(run: PlannedRun, pipeline_stage: int) -> int:
    """Return the bytes of what pipeline stages send: states of student and teacher (``distill/payload.py``).

    Counts one received payload for each micro-batch in flight, and a copy of the teacher's part of one; the payload
    that is being sent, or its gradient; and, once forward and backward passes alternate, input and input gradient of
    the previous micro-batch, which megatron frees only after the next output exists.
    """
    at, c, d, pp = run.share, run.teacher.hidden_size, run.student.hidden_size, run.layout.pp
    alternates = run.micro_batches > warm_up(run, pipeline_stage) + 1
    received = in_flight(run, pipeline_stage) + 2 * alternates if pipeline_stage else 0
    sent = pipeline_stage < pp - 1
    return at.outer(c + d) * (received + sent) + (at.outer(c) if pipeline_stage else 0)


# ---- the whole ----


def head_shape(run: PlannedRun) -> HeadShape:
    return HeadShape(
        tokens=run.share.tokens, taught=run.taught, rows=run.rows // run.layout.tp, width=run.student.hidden_size,
        teacher_width=run.teacher.hidden_size, tp=run.layout.tp, sequence_parallel=run.layout.sequence_parallel,
        head_trained=run.trains(HEAD),
    )  # fmt: skip


def stage_elements(run: PlannedRun, arch: Architecture, pipeline_stage: int) -> dict[str, int]:
    """Return ``{name: elements}`` of ``arch`` on a rank of ``pipeline_stage``."""
    shards = Shards(rows=run.rows, tp=run.layout.tp, pp=run.layout.pp, pipeline_stage=pipeline_stage)
    return rank_elements(arch, shards)


def student_weights(run: PlannedRun, pipeline_stage: int) -> tuple[Weights, int]:
    """Return the student's bytes during the passes of a step, and what its update needs beside them."""
    sharers = run.work.processes // (run.layout.tp * run.layout.pp)
    found = weights(stage_elements(run, run.student, pipeline_stage), run.trains, sharers)
    return (replace(found, optimizer=0), found.optimizer) if run.offload_optimizer else (found, 0)


def teacher_weights(run: PlannedRun, pipeline_stage: int) -> tuple[int, int]:
    """Return the teacher's bytes, and what it needs beside them while it reads."""
    elements, largest = stage_elements(run, run.teacher, pipeline_stage), 0
    if run.teacher_fp8:
        elements = in_fp8(elements)
    if run.offload_teacher:
        elements, largest = streamed_teacher(elements, run.teacher.tie_word_embeddings)
    return weights(elements, lambda _: False, 1).parameters, largest


def peak(run: PlannedRun, pipeline_stage: int) -> Peak:
    """Return the peak of a rank of ``pipeline_stage``, counted from 0."""
    layout, at, d = run.layout, run.share, run.student.hidden_size
    layers = run.student.plan.stages(layout.pp)[pipeline_stage]
    sub_layers, recomputed = stage_sub_layers(run, layers), run.recomputed(2 * len(layers))
    held, backward, loss = forward_bytes(sub_layers, recomputed), backward_bytes(sub_layers, recomputed), 0
    if run.kind.layerwise:
        states = layer_states_bytes(run, pipeline_stage, layers)
    else:
        states = payload_bytes(run, pipeline_stage)
        if pipeline_stage == layout.pp - 1:
            held += at.outer(d + 2)  # of the final norm
            loss = run.loss.memory(head_shape(run))
            if run.trains(HEAD):  # the head's gradient is kept until the embedding's is computed
                backward += 2 * run.rows // layout.tp * d
    shared = tables(run.student, {run.student.plan[layer] for layer in layers}, at)
    student, updating = student_weights(run, pipeline_stage)
    teacher, reading = teacher_weights(run, pipeline_stage)
    reading += teacher_work(run.teacher, at, one_block(run.teacher, at, run.mlp_block))
    activations = held * in_flight(run, pipeline_stage) + shared
    # The teacher reads before the student does; the optimizer's states come back after the passes.
    others = reading - held, updating - activations - states
    gathered = at.inner(max(d, run.teacher.hidden_size)) if layout.sequence_parallel else 0  # megatron's buffer
    return Peak(
        layers=layers, student=student, teacher=teacher, activations=activations, teacher_states=states,
        loss=loss, backward=max(backward, *others), workspaces=WORKSPACES + gathered,
    )  # fmt: skip


def peaks(run: PlannedRun) -> list[Peak]:
    """Return the peak of each pipeline stage."""
    return [peak(run, pipeline_stage) for pipeline_stage in range(run.layout.pp)]
