"""Parallel layouts of a whole recipe: what fits, how fast it is, and the disk that the run needs. No torch in here."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import ParallelLayout, Work, misfits
from hylo_megatron.config.shapes import element_count
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.distill.losses import KL, LayerDistance
from hylo_megatron.planner.speed import FITTED, tokens_per_second
from hylo_megatron.planner.training import PlannedRun, peaks
from hylo_megatron.recipes.stage import Recipe, Stage

GIB = 1 << 30
DAY = 86400
# Share of a card's memory that a plan may fill. CUDA and NCCL take some GiB, and memory falls into fragments: a plan
# of 72.4 GiB, the 64K stage at 128K, ran out of memory on a card of 80.
USABLE = 0.9
# The same where a stage could recompute more. The plan is within 2 % of what torch takes, NCCL and fragments come on
# top, and running out of memory costs a user more than the 5 % of speed that more recomputation does.
CHOSEN = 0.85
WIDEST_TP = FITTED.node


@dataclass(frozen=True, kw_only=True)
class Training:
    """A recipe with the shapes of its models. ``base`` teaches the layer-wise stages.

    ``shared``: evaluations run on the GPUs beside the training, so its stages recompute what they declare.
    """

    recipe: Recipe
    student: Architecture
    base: Architecture
    teacher: Architecture
    shared: bool = False

    def run(self, stage: Stage, layout: ParallelLayout, gpus: int, recompute: int) -> PlannedRun:
        kind = stage_kind(stage.kind)
        return PlannedRun(
            student=self.student, teacher=self.base if kind.layerwise else self.teacher, kind=kind,
            loss=LayerDistance() if kind.layerwise else KL(chunk=4096, teacher_length=stage.teacher_length),
            layout=layout, work=work(stage, gpus), train=stage.train, recompute=recompute,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """A stage on one layout: bytes of the fullest rank, and tokens a second of all ranks.

    ``recompute`` of the ``sub_layers`` of a pipeline rank are recomputed.
    """

    stage: Stage
    memory: int
    speed: float
    recompute: int
    sub_layers: int

    @property
    def exceeds_declared(self) -> bool:
        return self.recompute > self.stage.recompute

    @property
    def days(self) -> float:
        return self.stage.tokens / self.speed / DAY


@dataclass(frozen=True, kw_only=True)
class LayoutPlan:
    """A whole recipe on one layout."""

    layout: ParallelLayout
    dp: int
    stages: tuple[StagePlan, ...]

    @property
    def memory(self) -> int:
        return max(stage.memory for stage in self.stages)

    @property
    def days(self) -> float:
        return sum(stage.days for stage in self.stages)


def work(stage: Stage, gpus: int) -> Work:
    return Work(processes=gpus, seq_length=stage.seq_length, micro_batch=stage.micro_batch,
                global_batch=stage.global_batch)  # fmt: skip


def candidates(training: Training, gpus: int) -> Iterator[ParallelLayout]:
    """Yield the layouts of ``gpus`` processes that models, sequences and batches of all stages divide by."""
    models = (training.student, training.base, training.teacher)
    stages = training.recipe.stages
    for layout in dividing(models, [Work(processes=gpus, seq_length=stage.seq_length) for stage in stages], gpus):
        works = [work(stage.among(gpus // layout.ranks), gpus) for stage in stages]
        if not any(misfits(arch, layout, each) for arch in models for each in works):
            yield layout


def dividing(models: tuple[Architecture, ...], works: list[Work], gpus: int) -> Iterator[ParallelLayout]:
    """Yield the layouts of ``gpus`` processes that all ``models`` and all ``works`` divide by."""
    sizes = [size for size in range(1, gpus + 1) if gpus % size == 0]
    for tp, cp, pp in product(sizes, repeat=3):
        layout = ParallelLayout(tp=tp, cp=cp, pp=pp, sequence_parallel=tp > 1)
        if tp > WIDEST_TP or layout.ranks > gpus:
            continue
        if not any(misfits(arch, layout, each) for arch in models for each in works):
            yield layout


def peak_bytes(run: PlannedRun) -> int:
    """Return the bytes of the fullest rank."""
    return max(peak.total for peak in peaks(run))


def least_recompute(run: PlannedRun, card: float) -> int:
    """Return the fewest sub-layers, in whole layers, that ``run`` has to recompute on a card of ``card`` bytes.

    As in ``run.recompute``, these are sub-layers of each pipeline rank. ``run.recompute`` is the most, and the result
    where a run with so many is above ``CHOSEN`` of the card too.
    """

    def fits(recompute: int) -> bool:
        return peak_bytes(replace(run, recompute=recompute)) <= CHOSEN * card

    most = min(run.recompute, run.sub_layers)
    return next(filter(fits, range(0, most, 2)), most)


def planned_stage(training: Training, stage: Stage, layout: ParallelLayout, gpus: int, card: float,
                  rate: float) -> StagePlan | None:  # fmt: skip
    """Return the stage on cards of ``card`` bytes, or None if it does not fit them.

    It recomputes as few sub-layers as a recipe's run on GPUs does, or all of them if it fits only so.
    """
    declared = training.run(stage, layout, gpus, stage.recompute)
    least = stage.recompute if training.shared else least_recompute(declared, card)
    everything = 0 if declared.kind.layerwise else declared.sub_layers
    for recompute in dict.fromkeys((least, everything)):
        run = replace(declared, recompute=min(recompute, declared.sub_layers))
        memory = peak_bytes(run)
        if memory <= USABLE * card:
            return StagePlan(stage=stage, memory=memory, speed=tokens_per_second(run, rate), recompute=run.recompute,
                             sub_layers=run.sub_layers)  # fmt: skip
    return None


def layouts(training: Training, gpus: int, memory_gib: float, rate: float) -> list[LayoutPlan]:
    """Return the layouts on which every stage fits, the fastest first. ``rate``: the card's, of products."""
    found = []
    for layout in candidates(training, gpus):
        stages = []
        for declared in training.recipe.stages:
            stage = declared.among(gpus // layout.ranks)
            plan = planned_stage(training, stage, layout, gpus, memory_gib * GIB, rate)
            if plan is None:
                break
            stages.append(plan)
        else:
            found.append(LayoutPlan(layout=layout, dp=gpus // layout.ranks, stages=tuple(stages)))
    return sorted(found, key=lambda plan: plan.days)


def disk_bytes(training: Training) -> int:
    """Return the most that a run has on its disk, in bf16: checkpoints of all models and stages, and the export.

    The newest checkpoint of a stage stays until the next one is complete. Of a finished stage the weights stay.
    """
    from hylo_megatron.checkpoint.save_room import checkpoint_bytes

    stages = [(training.student, stage_kind(stage.kind), stage.train, True) for stage in training.recipe.stages]
    saves = [checkpoint_bytes(*stage) for stage in stages]
    finished = [checkpoint_bytes(*stage, optimizer=False) for stage in stages]
    models = [training.base, training.student, training.student]
    models += [training.teacher] if training.teacher != training.base else []
    return 2 * sum(map(element_count, models)) + sum(finished) + 2 * max(saves)


def scaled(recipe: Recipe, base: Architecture) -> Recipe:
    """Return ``recipe`` for a base model that it was not written for: a quarter of the layers MLA, native geometry."""
    layers, full = base.num_layers, 2 * recipe.layers
    latent = max(1, layers // 4)
    stages = tuple(replace(s, recompute=2 * layers if s.recompute >= full else s.recompute) for s in recipe.stages)
    return replace(recipe, plan=f"{latent}MLA{layers - latent}GDN", linear=None, layers=layers, stages=stages,
                   geometry="native", init="data")  # fmt: skip
