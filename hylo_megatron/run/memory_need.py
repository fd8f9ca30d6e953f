"""The GPU memory that the stages of a recipe need, by the planner's count, before the first of them starts."""

from dataclasses import replace

from hylo_megatron.checkpoint.iterations import trained_to
from hylo_megatron.config import Architecture
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.distill.command_line import layout_of
from hylo_megatron.distill.first_flags import first_flags
from hylo_megatron.distill.losses import fitting
from hylo_megatron.distill.memory_check import check_memory, gpu_bytes, planned_run
from hylo_megatron.errors import HyLoError
from hylo_megatron.recipes.stage import Stage
from hylo_megatron.run.training_process import GPU_FLAGS


def check(run, student: Architecture, base: Architecture, teacher: Architecture) -> None:
    """Refuse a ``Run`` with a stage that is not trained yet and cannot fit a GPU. Without one nothing is checked."""
    available = gpu_bytes(0)
    missing = [stage for stage in run.recipe.stages if not trained_to(run.out / stage.name, stage.steps)]
    for stage in missing if available else ():
        taught_by = base if stage_kind(stage.kind).layerwise else teacher
        _check_stage(stage, run, student, taught_by, available)


def _check_stage(stage: Stage, run, student: Architecture, teacher: Architecture, available: int) -> None:
    shared = fitting((*GPU_FLAGS, *run.flags), stage_kind(stage.kind), stage.loss)
    flags = [*run.processes.fit(stage).flags(), *map(str, shared), *run.processes.layout.flags()]
    known = first_flags(flags)
    layout, work = layout_of(known)
    planned = planned_run(known, student, teacher, layout, replace(work, processes=run.processes.ranks))
    try:
        check_memory(planned, flags, available)
    except HyLoError as error:
        raise HyLoError(f"{stage.name}: {error}") from None
