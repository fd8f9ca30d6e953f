"""The peak of a training run on the ranks of each pipeline stage: what is always there, and the fullest moment of a
step. Legend: D student width, C teacher width, T tokens of a rank, N vocabulary rows of a rank.
"""

from dataclasses import dataclass, replace

from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import ParallelLayout, Work
from hylo_megatron.config.pair import padded_rows
from hylo_megatron.mixers.memory import Half, Share
from hylo_megatron.planner.activations import mixer as mixer_bytes
from hylo_megatron.planner.activations import mlp, tables, teacher_work
from hylo_megatron.planner.weights import HEAD, Weights, is_trained, rank_elements, stage_layers, weights

# torch takes 32 MiB for cuBLAS from each stream and thread that multiplies: the main and autograd's thread, each on
# the default stream and on the one that a CUDA graph is captured on.
WORKSPACES = 4 * 32 * 2**20


@dataclass(frozen=True)
class Training:
    """A run as its flags say. ``recompute``: ``--recompute-num-layers`` halves of layers of a stage, method block;
    ``work.processes`` and the layout give the data-parallel size."""

    student: Architecture
    teacher: Architecture
    stage: str  # "ild" | "distill"
    layout: ParallelLayout
    work: Work
    train: str = "all"  # "all" | "mixers"
    recompute: int = 0
    kl_chunk: int = 4096
    teacher_length: int | None = None

    @property
    def share(self) -> Share:
        return Share(self.layout, self.work.micro_batch, self.work.seq_length // self.layout.cp)

    @property
    def micro_batches(self) -> int:
        """Of a step, on each rank."""
        data_parallel = self.work.processes // self.layout.ranks
        return max(1, self.work.global_batch // (self.work.micro_batch * data_parallel))


@dataclass(frozen=True)
class Peak:
    """Bytes on a rank of one pipeline stage. ``loss`` and ``backward``: beside the activations, when the loss is
    computed and in the fullest moment of the backward pass; they do not come together."""

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


def stage_halves(run: Training, layers: range) -> list[Half]:
    """Mixers and MLPs in turn. In ild a mixer's input is the teacher's, and each output meets the teacher's in a
    distance (two a layer, fp32). That drops both before the MLP's own backward pass begins; in a pipeline the schedule
    holds the teacher's."""
    halves, at, copied = [], run.share, run.train == "all"
    hidden = at.outer(run.student.hidden_size)
    dropped = hidden * (2 if run.layout.pp == 1 else 1)
    for layer in layers:
        mixer, rest = mixer_bytes(run.student.plan[layer], run.student, at), mlp(run.student, at, copied)
        if run.stage == "ild":
            rest = replace(rest, kept=rest.kept + hidden + at.outer(4), work=rest.work - dropped)
        else:  # x, and its statistics where the norm's weight is not trained
            mixer = replace(mixer, kept=mixer.kept + hidden + (0 if copied else at.outer(2)))
        halves += [mixer, rest]
    return halves


def forward_bytes(halves: list[Half], recompute: int) -> int:
    """What a micro-batch keeps; of the first ``recompute`` halves only their input."""
    return sum(half.entry for half in halves[:recompute]) + sum(half.kept for half in halves[recompute:])


def backward_bytes(halves: list[Half], recompute: int) -> int:
    """The most that is beside ``forward_bytes`` while the backward pass goes from the last half to the first."""
    beside = most = 0
    for index in reversed(range(len(halves))):
        half = halves[index]
        again = half.kept - half.entry if index < recompute else 0
        most = max(most, beside + again + half.work)
        beside += again - half.kept
    return most


def logit_rows(tokens: int, taught: int, chunk: int) -> int:
    """Rows of bf16 logits in memory at most: ``kl.py`` drops a chunk's teacher and student only when the next one's
    take their place. ``taught``: of ``tokens``, those that the teacher has read."""
    starts = [*range(0, taught, chunk), *range(taught, tokens, chunk)]
    teacher = student = most = 0
    for start, end in zip(starts, [*starts[1:], tokens], strict=True):
        rows = end - start
        if start < taught:
            most = max(most, teacher + student + rows)
        teacher = rows if start < taught else 0
        most = max(most, teacher + student + rows)
        student = rows
    return most


def taught_length(run: Training) -> int:
    """Of each sequence's part on this rank, as ``DistillModel._taught``."""
    alone = run.layout.cp == 1 and run.layout.pp == 1
    return min(run.share.length, run.teacher_length) if run.teacher_length and alone else run.share.length


def loss_bytes(run: Training, rows: int) -> int:
    """Hidden states of both models, gradients of the student's and (fp32) of its head, and logits. ``rows``: N."""
    at, d = run.share, run.student.hidden_size
    taught = at.sequences * taught_length(run)
    hidden = at.inner(2 * d) + 2 * taught * run.teacher.hidden_size
    if run.layout.sequence_parallel:  # gathered, beside what they were gathered from
        hidden += at.outer(d) + 2 * taught * run.teacher.hidden_size // run.layout.tp
    logits = 2 * rows * logit_rows(at.tokens, taught, run.kl_chunk)
    if not is_trained(run.stage, run.train)(HEAD):
        return hidden + logits
    last = 2 * rows * (2 * min(run.kl_chunk, at.tokens) + d)  # a chunk's logits, and the product that is added
    return hidden + 4 * rows * d + max(logits, last)


def warm_up(run: Training, stage: int) -> int:
    """Micro-batches that a stage reads before its first backward pass (1F1B; none in ild, ``teacher_fed.py``)."""
    return 0 if run.stage == "ild" else min(run.micro_batches, run.layout.pp - 1 - stage)


def in_flight(run: Training, stage: int) -> int:
    """Micro-batches whose activations a stage holds at once."""
    return min(run.micro_batches, warm_up(run, stage) + 1)


def states_bytes(run: Training, stage: int, layers: range) -> int:
    """ild: what enters a stage's layers and leaves each half, of this micro-batch and of those read ahead; in a
    pipeline also what comes for the next one, and behind the last stage's norm. distill: ``messages_bytes``."""
    at, pp, last = run.share, run.layout.pp, run.layout.pp - 1
    if run.stage == "distill":
        return messages_bytes(run, stage)
    tensors = (2 * len(layers) + 1) * (last - stage + 1) + (stage > 0) + (pp > 1 and stage == last)
    return at.outer(run.teacher.hidden_size) * tensors


def messages_bytes(run: Training, stage: int) -> int:
    """What stages send, student's and teacher's states side by side: received for each micro-batch in flight, with the
    teacher's part once more; sent on, or its gradient; and once micro-batches take turns, the input and its gradient
    of the one before, which the engine holds until the next output is there."""
    at, c, d, pp = run.share, run.teacher.hidden_size, run.student.hidden_size, run.layout.pp
    takes_turns = run.micro_batches > warm_up(run, stage) + 1
    messages = (in_flight(run, stage) + 2 * takes_turns if stage else 0) + (stage < pp - 1)
    return at.outer(c + d) * messages + (at.outer(c) if stage else 0)


def peak(run: Training, stage: int) -> Peak:
    """Of a rank of pipeline stage ``stage``, from 0."""
    layout, at, d = run.layout, run.share, run.student.hidden_size
    padded = padded_rows(run.student, run.teacher, layout.tp)
    trained = is_trained(run.stage, run.train)
    student, teacher = (
        rank_elements(arch, padded, layout.tp, layout.pp, stage) for arch in (run.student, run.teacher)
    )
    layers = stage_layers(run.student, layout.pp)[stage]
    halves, recompute = stage_halves(run, layers), 0 if run.stage == "ild" else run.recompute
    held, backward, loss = forward_bytes(halves, recompute), backward_bytes(halves, recompute), 0
    if run.stage == "distill" and stage == layout.pp - 1:
        held += at.outer(d + 2)  # of the last norm
        loss = loss_bytes(run, padded // layout.tp)
        backward += 2 * padded // layout.tp * d if trained(HEAD) else 0  # the head's gradient, until the embedding's
    student_kinds = {run.student.plan[layer] for layer in layers}
    shared = tables(run.student, student_kinds, at) + tables(run.teacher, set(run.teacher.plan), at)
    reading = teacher_work(run.teacher, at) - held  # while the teacher is at work, before the student
    gathered = at.inner(max(d, run.teacher.hidden_size)) if layout.sequence_parallel else 0  # the engine's buffer
    return Peak(
        layers, weights(student, trained, run.work.processes // (layout.tp * layout.pp)),
        weights(teacher, lambda _: False, 1).parameters, held * in_flight(run, stage) + shared,
        states_bytes(run, stage, layers), loss, max(backward, reading), WORKSPACES + gathered,
    )  # fmt: skip


def peaks(run: Training) -> list[Peak]:
    """One a pipeline stage."""
    return [peak(run, stage) for stage in range(run.layout.pp)]
