"""The disk space that a recipe's run still needs, step by step, computed before the run starts."""

import sys
from pathlib import Path

from hylo_megatron.checkpoint import disk
from hylo_megatron.checkpoint.iterations import complete_iterations, trained_to
from hylo_megatron.checkpoint.save_room import checkpoint_bytes
from hylo_megatron.config import Architecture
from hylo_megatron.config.shapes import element_count
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.convert.hf_config import read_architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.run.training_process import fast_bf16

EXPORTED = 2  # bytes per parameter in an exported folder


def weights_bytes(folder: Path) -> int:
    """Return the bytes of a Hugging Face folder's weights; a converted checkpoint has as many."""
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _checkpoints(run, stage, student: Architecture, optimizer: bool, there: bool) -> tuple[int, int]:
    """Return the bytes of a stage's checkpoints at its end, and the most meanwhile. ``there``: one is on the disk.

    An old checkpoint stays until the new one is complete. That of the last step has weights alone.
    """
    what = student, stage_kind(stage.kind), stage.train, fast_bf16()
    full, weights = checkpoint_bytes(*what, optimizer), checkpoint_bytes(*what, optimizer=False)
    before = (stage.steps - 1) // run.recipe.save_every  # saves before the last step
    most = max(min(before, 2) * full, min(before, 1) * full + weights)
    return (0, max(full, weights)) if there else (weights, most)


def needs(run, student: Architecture, optimizer: bool = True) -> list[tuple[str, int, int]]:
    """Return ``(name, bytes that stay, bytes meanwhile)`` of each step of ``run`` that is not done, in order."""
    source, found = run.source, []

    def add(what: str, path: Path, stays: int) -> None:
        if not path.exists():
            found.append((what, stays, stays))

    base = weights_bytes(source.base)
    add("the base model's checkpoint", run.base, base)
    if source.teacher:
        add("the teacher's checkpoint", run.teacher, weights_bytes(source.teacher))
    width = base / element_count(read_architecture(source.base))  # bytes per parameter
    if not run.recipe.control:
        add("the student", run.out / "student", int(element_count(student) * width))
    if source.held_out or run.recipe.stages[0].on_policy:
        add("hf-init", run.out / "hf-init", EXPORTED * element_count(student))
    for stage, after in zip(run.recipe.stages, (*run.recipe.stages[1:], None), strict=True):
        folder = run.out / stage.name
        if not trained_to(folder, stage.steps):
            there = folder.is_dir() and bool(complete_iterations(folder))
            found.append((stage.name, *_checkpoints(run, stage, student, optimizer, there)))
        if source.held_out or after is None or after.on_policy:
            add(f"hf-{stage.name}", run.out / f"hf-{stage.name}", EXPORTED * element_count(student))
    return found


def check(run, student: Architecture) -> None:
    """Refuse a ``Run`` whose next training cannot save, and warn if the disk will be full before the run ends."""
    free, taken, least, most, last = disk.free(run.out), 0, None, 0, ""
    stages = {stage.name for stage in run.recipe.stages}
    for what, stays, meanwhile in needs(run, student, "--no-save-optim" not in map(str, run.flags)):
        if taken + meanwhile > most:
            most, last = taken + meanwhile, what
        if least is None and what in stages:
            least = most
        taken += stays
    if least is not None and least > free:
        raise HyLoError(disk.line(run.out, least, "no room for the run's next checkpoint"))
    if most > free:
        text = disk.line(run.out, most, f"no room for the whole run, which will stop at {last}")
        print(f"warning: {text}", file=sys.stderr, flush=True)
