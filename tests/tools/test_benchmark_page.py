"""The commands of docs/benchmarks.md: their layouts start, and fit a card of 80 GB."""

import argparse
import shlex
from dataclasses import replace

import pytest
from helpers.paths import DOCS, ROOT

from hylo_megatron.config.layout import ParallelLayout


@pytest.fixture(autouse=True)
def bench(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")


def page_commands(program: str) -> list[list[str]]:
    lines = (DOCS / "benchmarks.md").read_text().splitlines()
    return [shlex.split(line, comments=True)[2:] for line in lines if line.startswith(f"python tools/bench/{program}")]


def first_checks(job, options, processes, flags, monkeypatch) -> None:
    """Run what the trainer checks before it imports torch, as on these ranks."""
    from measured_step import step_flags

    from hylo_megatron.distill.command_line import check_command_line

    monkeypatch.setenv("WORLD_SIZE", str(processes.ranks))
    check_command_line(["--bf16", *step_flags(job, processes, options, flags), *processes.layout.flags()])


CARD_GIB = 79.1  # what the driver says of a card of 80 GB


@pytest.mark.parametrize("flags", page_commands("scaling.py"), ids=" ".join)
def test_layouts_of_the_page_start_and_fit(flags, tmp_path, monkeypatch):
    """Also without an accelerator: heads, layers, lengths and memory of every row."""
    import scaling

    options = scaling.parsed(flags)
    options.gpus, options.gpu_memory = options.gpus or 8, CARD_GIB
    job = scaling.job_of(options, tmp_path)
    for candidate in scaling.chosen(job, options, 728e12):
        assert candidate.memory < CARD_GIB - 1
        first_checks(job, options, candidate.processes, candidate.flags, monkeypatch)


@pytest.mark.parametrize("flags", page_commands("train_step.py"), ids=" ".join)
def test_steps_of_the_page_start_and_fit(flags, tmp_path, monkeypatch):
    import train_step
    from measured_step import job_of, planned

    from hylo_megatron.planner.training import peaks

    options = train_step.parsed(flags)
    job = job_of(options, tmp_path)
    train_step.check_peer(options, job, None)
    processes = train_step.processes_of(options, None)
    run = planned(job, processes, options)
    assert max(peak.total for peak in peaks(run)) < (CARD_GIB - 1) * 2**30
    first_checks(job, options, processes, (), monkeypatch)


@pytest.mark.parametrize("flags", page_commands("recipe_faults.py"), ids=" ".join)
def test_recipes_of_the_page_fit(flags, tmp_path, monkeypatch):
    """Every stage on all ranks, and the last one on half of them, by the recipe's own check of memory."""
    import recipe_faults

    from hylo_megatron.recipes.shapes import SHAPES, recipe_named, student_shape
    from hylo_megatron.run import memory_need
    from hylo_megatron.run.launch import Processes

    options = recipe_faults.parsed(flags)
    recipe, base = recipe_named(options.recipe), SHAPES[options.recipe]
    monkeypatch.setattr(memory_need, "gpu_bytes", lambda index: int(CARD_GIB * 2**30))
    half = options.half_layout or options.layout, options.half_flags or options.flags
    for ranks, (sizes, more), stages in ((options.ranks, (options.layout, options.flags), recipe.stages),
                                         (options.ranks // 2, half, recipe.stages[-1:])):  # fmt: skip
        layout = ParallelLayout(**{name.lower(): int(size) for name, size in (each.split("=") for each in sizes)})
        run = argparse.Namespace(recipe=replace(recipe, stages=stages), out=tmp_path, flags=more.split(),
                                 background=argparse.Namespace(beside=False),
                                 processes=Processes.among(ranks, "ranks", layout))  # fmt: skip
        memory_need.settle(run, student_shape(recipe, base), base, SHAPES[options.teacher_shape or options.recipe])
