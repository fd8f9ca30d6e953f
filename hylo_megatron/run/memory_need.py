"""The GPU memory that the stages of a recipe need, by the planner's count, before the first of them starts.

A stage that may recompute then recomputes as few sub-layers as its GPUs have memory for.
"""

from dataclasses import replace

from hylo_megatron.checkpoint.iterations import trained_to
from hylo_megatron.config import Architecture
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.distill.command_line import layout_of
from hylo_megatron.distill.first_flags import first_flags
from hylo_megatron.distill.losses import fitting
from hylo_megatron.distill.memory_check import UNPLANNED, check_memory, gpu_bytes, planned_run
from hylo_megatron.errors import HyLoError
from hylo_megatron.planner.layouts import GIB, least_recompute, peak_bytes
from hylo_megatron.planner.training import PlannedRun
from hylo_megatron.recipes.stage import Stage
from hylo_megatron.run.training_process import GPU_FLAGS

# Flags of a user (or how they begin) with which a stage recomputes what it declares: they choose recomputation
# themselves, or the planner does not count them.
KEEPING = ("--recompute-", "--no-memory-check", "--num-layers-per-virtual", "--num-virtual-stages", *UNPLANNED)


def settle(run, student: Architecture, base: Architecture, teacher: Architecture) -> dict[str, int]:
    """Return ``{stage: sub-layers}`` for the stages of a ``Run`` that recompute as few as fit, and print them.

    Raises ``HyLoError`` for a stage that is not trained yet and cannot fit a GPU. Without a GPU nothing is checked or
    chosen.
    """
    # The smallest card of this machine. This process chooses for the ranks of all nodes, because their command lines
    # come from it (run/world.py), so all ranks recompute the same sub-layers.
    available = min(filter(None, map(gpu_bytes, range(run.processes.ranks))), default=None)
    missing = [stage for stage in run.recipe.stages if not trained_to(run.out / stage.name, stage.steps)]
    chosen = {}
    for stage in missing if available else ():
        flags = _flags(stage, run)
        planned = _planned(run, flags, student, base if stage_kind(stage.kind).layerwise else teacher)
        if _chooses(stage, run, planned):
            chosen[stage.name] = least_recompute(planned, available)
            planned = replace(planned, recompute=chosen[stage.name])
        try:
            check_memory(planned, flags, available)
        except HyLoError as error:
            raise HyLoError(f"{stage.name}: {error}") from None
        if stage.name in chosen:
            print(_line(stage, planned, available), flush=True)
    return chosen


def _flags(stage: Stage, run) -> list[str]:
    shared = fitting((*GPU_FLAGS, *run.flags), stage_kind(stage.kind), stage.loss)
    return [*run.processes.fit(stage).flags(), *map(str, shared), *run.processes.layout.flags()]


def _planned(run, flags: list[str], student: Architecture, teacher: Architecture) -> PlannedRun | None:
    known = first_flags(flags)
    layout, work = layout_of(known)
    return planned_run(known, student, teacher, layout, replace(work, processes=run.processes.ranks))


def _chooses(stage: Stage, run, planned: PlannedRun | None) -> bool:
    """Return whether the planner counts the stage, nobody else chooses for it, and it has the GPUs to itself."""
    if not stage.recompute or planned is None or not planned.student.is_hybrid:
        return False
    return not run.background.beside and not any(str(word).startswith(KEEPING) for word in run.flags)


def _line(stage: Stage, planned: PlannedRun, available: int) -> str:
    each = " of a pipeline rank" if planned.layout.pp > 1 else ""
    return (
        f"{stage.name}: {planned.recompute} of {planned.sub_layers} sub-layers{each} recomputed"
        f" ({peak_bytes(planned) / GIB:.1f} GiB of {available / GIB:.1f} by the planner's count)"
    )
