"""A full disk ends a run in one line that says file, need and free space, and what was there before stays.

Most disks here are full because of a limit on the size of files, which needs no rights. ``test_small_disks`` mounts.
"""

import functools
import json
import os
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny
from helpers import train as helpers
from helpers.disks import ROOM, largest_file
from helpers.waits import PATIENCE

from hylo_megatron.checkpoint import disk, iterations
from hylo_megatron.checkpoint.save_room import checkpoint_bytes
from hylo_megatron.config import Architecture
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf
from hylo_megatron.data.prepare import prepare
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import command_line
from hylo_megatron.init.upcycle import student_architecture, upcycle
from hylo_megatron.recipes.proxy import proxy
from hylo_megatron.recipes.published import BASES, published
from hylo_megatron.run import disk_need, memory_need
from hylo_megatron.run.launch import Processes
from hylo_megatron.run.recipe_run import Run
from hylo_megatron.run.source import Source
from hylo_megatron.run.training_process import fast_bf16


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.random_world(tmp_path_factory.mktemp("world"))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    return tiny.save_model(tiny.teacher_model("llama"), tmp_path_factory.mktemp("model") / "hf")


# ---- conversion, upcycling, export, tokens ----


def test_tools_name_file_need_and_free_space(model, world, tmp_path, monkeypatch):
    checkpoint, text = tmp_path / "base", tmp_path / "text.jsonl"
    hf_to_megatron.convert(model, checkpoint)
    text.write_text("".join(json.dumps({"text": "w3 " * 4000}) + "\n" for _ in range(10)))
    plan = ("mla", "gdn", "gdn", "mla")
    jobs = {
        "convert": functools.partial(hf_to_megatron.convert, model),
        "upcycle": lambda out: upcycle(checkpoint, out, plan, init="svd", log=str),
        "export": functools.partial(megatron_to_hf.convert, world["gdn"]),
    }
    for name, job in jobs.items():
        with largest_file(20_000), pytest.raises(HyLoError, match=f"{name}.*: file too large: {ROOM}"):
            job(tmp_path / name)
        assert not list(tmp_path.glob(f"{name}*")), name
    with largest_file(20_000), pytest.raises(HyLoError, match=r"tokens: no space left after .* free on its disk"):
        prepare([text], model, tmp_path / "tokens")
    monkeypatch.setattr(disk, "free", lambda _: 1000)  # known before anything is written
    for name in ("convert", "export"):
        with pytest.raises(HyLoError, match=f"{name}: no space left: it needs .*, 1 KiB is free"):
            jobs[name](tmp_path / name)
    assert not list(tmp_path.glob("convert*")) and not list(tmp_path.glob("export*"))


def test_any_tool_says_one_line(tmp_path, capsys):
    @command_line
    def main():
        with largest_file(100):
            (tmp_path / "file").write_text("x" * 1000)

    with pytest.raises(SystemExit):
        main()
    assert re.fullmatch(r"error: File too large: .*free space.*\n", capsys.readouterr().err)


# ---- what is known before a training ----


def test_the_estimate_is_what_a_checkpoint_takes(world):
    arch, distill, ild = Architecture.load(world["gdn"]), stage_kind("distill"), stage_kind("ild")
    assert checkpoint_bytes(arch, distill, "all", True) > checkpoint_bytes(arch, ild, "mixers", True)
    weights = sum(path.stat().st_size for path in (world["gdn"] / "release").iterdir())
    assert checkpoint_bytes(arch, distill, "all", False, optimizer=False) == pytest.approx(weights, rel=0.15)


@pytest.fixture
def recipe_run(model, tmp_path) -> Run:
    recipe = proxy(published("llama1b", None, "gdn"), BASES["llama1b"])
    geometry = student_architecture(hf_to_megatron.read_architecture(model), ("mla",) * 4, "native").geometry
    recipe = replace(recipe, layers=4, plan="0,3", geometry=geometry)
    return Run(recipe, tmp_path / "out", Processes(), Source(model, (tmp_path / "tokens",)))


def test_the_need_of_a_recipe(recipe_run, monkeypatch, capsys):
    run = recipe_run
    student = student_architecture(hf_to_megatron.read_architecture(run.hf), run.plan, run.recipe.geometry)
    needs = {what: (stays, meanwhile) for what, stays, meanwhile in disk_need.needs(run, student)}
    stages = [stage.name for stage in run.recipe.stages]
    assert list(needs) == ["the base model's checkpoint", "the student", *stages, f"hf-{stages[-1]}"]
    for stage in run.recipe.stages:  # at most two with the optimizer's states; the last has weights alone
        stays, meanwhile = needs[stage.name]
        assert stays == checkpoint_bytes(student, stage_kind(stage.kind), stage.train, fast_bf16(), optimizer=False)
        full = checkpoint_bytes(student, stage_kind(stage.kind), stage.train, fast_bf16())
        saves = -(-stage.steps // run.recipe.save_every)
        assert meanwhile == {1: stays, 2: full + stays}.get(saves, 2 * full) and stays < full
    free = [2**40]
    monkeypatch.setattr(disk, "free", lambda _: free[0])
    run._check_room()
    assert not capsys.readouterr().err
    before = [sum(stays for stays, _ in list(needs.values())[:index]) for index in range(len(needs))]
    free[0] = max(taken + meanwhile for taken, (_, meanwhile) in zip(before, needs.values(), strict=True)) - 1000
    run._check_room()
    assert "no room for the whole run" in (said := capsys.readouterr().err) and said.count("\n") == 1
    free[0] = sum(needs[what][0] for what in list(needs)[:2])
    with pytest.raises(HyLoError, match=f"no room for the run's next checkpoint: {ROOM}"):
        run._check_room()


def test_the_need_counts_the_first_student_where_it_is_exported(recipe_run, tmp_path):
    """It is, to be measured, or to write text for the first stage."""
    student = student_architecture(hf_to_megatron.read_architecture(recipe_run.hf), recipe_run.plan, "native")
    recipe, source = recipe_run.recipe, recipe_run.source
    assert "hf-init" not in [what for what, *_ in disk_need.needs(recipe_run, student)]
    recipe_run.source = replace(source, held_out=tmp_path)
    assert "hf-init" in [what for what, *_ in disk_need.needs(recipe_run, student)]
    first = replace(recipe.stages[0], on_policy=0.5)
    recipe_run.source, recipe_run.recipe = source, replace(recipe, stages=(first, *recipe.stages[1:]))
    stays = {what: stays for what, stays, _ in disk_need.needs(recipe_run, student)}
    assert stays["hf-init"] == stays[f"hf-{recipe.stages[-1].name}"]


def test_a_stage_that_no_gpu_has_memory_for_is_refused_before_the_run(recipe_run, monkeypatch, capsys):
    memory = [2**40]
    monkeypatch.setattr(memory_need, "gpu_bytes", lambda index: memory[0])
    recipe_run._check_room()
    assert not capsys.readouterr().err
    memory[0] = 2**20
    first = recipe_run.recipe.stages[0].name
    with pytest.raises(HyLoError, match=f"^{first}: memory: the fullest rank needs .* lower --micro-batch-size"):
        recipe_run._check_room()
    monkeypatch.setattr(memory_need, "trained_to", lambda folder, steps: True)  # a stage that is done needs no memory
    recipe_run._check_room()


# ---- real trainings ----


# A save of rank 0 finds a disk that has become full after it was looked at. 0: so does every process of the run.
PROGRAM = """
import resource, sys
if __name__ == "__main__":
    from hylo_megatron.checkpoint import save_room
    first, limit = int(sys.argv.pop(1)), int(sys.argv.pop(1))
    begin, saves = save_room.SaveRoom.begin, []

    def fill(at):
        if limit and at == first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    def begin_on_a_full_disk(self, place, *last):
        begin(self, place, *last)
        saves.append(place)
        fill(len(saves))

    fill(0)
    save_room.SaveRoom.begin = begin_on_a_full_disk
    save_room.SaveRoom._refuse_unless_room = lambda *_: None
    from hylo_megatron.train import main
    main()
"""
CONSTANT = dict(async_save=True, dist_ckpt_workers=4, ckpt_assume_constant_structure=True)


class Limited:
    """A training on a disk that is full at save number ``first``, or always if that is 0."""

    def __init__(self, world, folder: Path, first: int, limit: int, processes: int = 1, **flags):
        self.folder, program = folder, folder.with_suffix(".py")
        program.write_text(PROGRAM)
        argv = helpers.train_flags(world, "distill", folder, save_interval=2, train_iters=8, **flags)
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        command = [sys.executable, *(launcher if processes > 1 else []), program, first, limit, *argv]
        environment = helpers.environment() if processes > 1 else helpers.single()
        self.process = subprocess.Popen(list(map(str, command)), env=environment, stdout=subprocess.PIPE,
                                        stderr=subprocess.STDOUT, text=True)  # fmt: skip

    def said(self) -> str:
        """The one line; torchrun's own report of its ranks comes after it."""
        try:
            printed = self.process.communicate(timeout=PATIENCE)[0]
        finally:
            self.process.kill()
        assert self.process.returncode != 0
        errors = re.findall(r"^error: .*", printed, re.MULTILINE)
        assert len(errors) == 1, printed[-4000:]
        assert printed.count("Traceback (most recent") == printed.count("errors.ChildFailedError: "), printed[-4000:]
        return errors[0]


def test_full_disks_in_training(world, tmp_path):
    """Synchronously on two ranks after a checkpoint that stays; and by a writer's process, from the first save on."""
    runs = (
        Limited(world, tmp_path / "sync", 2, 100_000, processes=2),
        Limited(world, tmp_path / "async", 0, 200_000, **CONSTANT),
    )
    where = {"sync": "iter_0000004", "async": "iter_0000002"}
    for run, (name, iteration) in zip(runs, where.items(), strict=True):
        assert re.fullmatch(rf"error: .*{name}/{iteration}/__0_\d.distcp: .*: {ROOM}.*", run.said())
    assert iterations.trained_to(tmp_path / "sync", 2)
    assert not (tmp_path / "async" / iterations.TRACKER).exists()


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("flags", [{}, dict(async_save=True), CONSTANT], ids=["sync", "async", "constant"])
@pytest.mark.parametrize("kib", [2800, 4000, 5900, 7000])
def test_small_disks(kib, flags, world, tmp_path):
    """Checkpoints of 2,900 KiB on disks of ``kib``: full at the first, in the second's data, its metadata, the log."""
    if os.geteuid() != 0:
        pytest.skip("only root can mount a small disk")
    small = tmp_path / "small"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", small]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    try:
        began = time.monotonic()
        said = Limited(world, small / "run", 1, 0, **flags).said()
        print(f"FULL {kib} KiB, {flags or 'sync'}: {time.monotonic() - began:.0f} s, {said}", flush=True)
        assert str(small) in said and "is free on its disk" in said
        if (tracker := small / "run" / iterations.TRACKER).exists():
            assert iterations.trained_to(small / "run", int(tracker.read_text()))
    finally:
        subprocess.run(["umount", "-l", small], check=True)
