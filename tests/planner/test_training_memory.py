"""``hylo_megatron.planner`` against what autograd saves, what a step has alive and what the engine allocates."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from helpers import train as helpers
from helpers.paths import PROGRAMS
from helpers.waits import PATIENCE

from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import ParallelLayout, Work
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.distill.losses import KL, LayerDistance
from hylo_megatron.distill.losses.kl import logit_rows
from hylo_megatron.planner.activations import tables
from hylo_megatron.planner.training import Peak, PlannedRun, in_flight, peak, stage_sub_layers


@pytest.fixture(scope="module")
def counting(tmp_path_factory):
    """``activation_bytes.py``, started: the engine's runs go on beside it."""
    pytest.importorskip("triton")
    pytest.importorskip("fla")
    folder = tmp_path_factory.mktemp("counting")
    with (folder / "out").open("w") as out, (folder / "err").open("w") as err:
        process = subprocess.Popen([sys.executable, "-W", "ignore", PROGRAMS / "activation_bytes.py"],
                                   env=helpers.environment(), stdout=out, stderr=err)  # fmt: skip
    yield process, folder
    process.kill()
    process.wait()


@pytest.fixture(scope="module")
def counted(counting) -> dict:
    process, folder = counting
    assert process.wait(PATIENCE) == 0, (folder / "err").read_text()[-2000:]
    return json.loads((folder / "out").read_text().splitlines()[-1])


RUNS = {  # processes, student, flags
    "alone": (1, "gdn", dict(hylo_stage="distill")),
    "tp": (2, "untied", dict(hylo_stage="distill", tensor_model_parallel_size=2, sequence_parallel=True)),
    "pp": (2, "gdn", dict(hylo_stage="distill", pipeline_model_parallel_size=2)),
    "dp": (2, "gdn", dict(hylo_stage="ild")),
}


def _planned(name: str, world: dict[str, Path], stage: int) -> Peak:
    processes, student, flags = RUNS[name]
    tp, pp = (flags.get(f"{name}_model_parallel_size", 1) for name in ("tensor", "pipeline"))
    kind = stage_kind(flags["hylo_stage"])
    run = PlannedRun(
        student=Architecture.load(world[student]),
        teacher=Architecture.load(world[f"{student}-teacher"]),
        kind=kind,
        loss=LayerDistance() if kind.layerwise else KL(chunk=4096),
        layout=ParallelLayout(tp=tp, pp=pp),
        work=Work(processes=processes, seq_length=helpers.SEQ, micro_batch=2, global_batch=4),
        train=kind.train,
    )
    return peak(run, stage)


def _command_line(name: str, work: Path, world: dict[str, Path]) -> list[str]:
    _, student, flags = RUNS[name]
    flags = flags | dict(student=student, teacher=f"{student}-teacher", bf16=True, train_iters=1, lr_warmup_iters=0)
    return [*map(str, helpers.train_flags(world, flags.pop("hylo_stage"), work / name, **flags))]


@pytest.mark.slow
def test_weights_gradients_and_optimizer_are_the_engines(tmp_path, counting):
    """Exactly, but for the padding of gradient buffers and of the optimizer's shares (1 %)."""
    world = helpers.random_world(tmp_path)
    changes = dict(tie_word_embeddings=False, mla_qk_norm=True)
    world["untied"], world["untied-teacher"] = helpers.write_pair(tmp_path / "untied", "mamba2", **changes)
    helpers.shutil.copytree(world["gdn"] / "hf", world["untied"] / "hf", dirs_exist_ok=True)
    runs = {
        count: [_command_line(name, tmp_path, world) for name in RUNS if RUNS[name][0] == count] for count in (1, 2)
    }
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    done = subprocess.run([sys.executable, "-W", "ignore", PROGRAMS / "memory_runs.py", tmp_path / "runs.json"],
                          env=helpers.environment(), capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    for name, (processes, *_) in RUNS.items():
        for rank in range(processes):
            got = json.loads((tmp_path / name / f"memory-{rank}.json").read_text())
            found = _planned(name, world, rank if name == "pp" else 0)
            assert found.student.parameters == got["parameters"], (name, rank)
            assert found.teacher == got["teacher"], (name, rank)
            assert found.student.gradients == got["gradients"], (name, rank)
            assert found.student.gradients == pytest.approx(got["buffers"], rel=0.01)
            shares = 0.01 if name == "dp" else 0  # cut anywhere, but for padding
            assert found.student.optimizer == pytest.approx(got["optimizer"], rel=shares), (name, rank)


def _beside_weights(found: Peak) -> int:
    return found.activations + found.teacher_states + max(found.loss, found.backward)


def _planned_layer(case: tuple) -> list[int]:
    """Return the bytes that mixer and MLP of one of ``HALVES`` are planned to keep."""
    from programs import activation_bytes as known

    layout, kind, wide, train = case
    arch = known.half_arch(kind, wide)
    run = PlannedRun(
        student=arch, teacher=arch.as_teacher(), kind=stage_kind("distill"), loss=KL(),
        layout=ParallelLayout(**known.LAYOUTS[layout]),
        work=Work(processes=2, seq_length=known.LENGTH, micro_batch=known.ROWS), train=train,
    )  # fmt: skip
    mixer, mlp = (half.kept for half in stage_sub_layers(run, range(1)))
    return [mixer + tables(arch, set(arch.plan), run.share), mlp]


def test_layers_keep_what_autograd_saves(counted):
    """To the halo and the indices of linear blocks under context parallelism, which are left out."""
    from programs import activation_bytes as known

    assert len(counted["halves"]) == len(known.HALVES)
    for case, got in zip(known.HALVES, counted["halves"], strict=True):
        across = known.LAYOUTS[case[0]].get("cp", 1) > 1
        assert _planned_layer(case) == pytest.approx(got, rel=5e-3 if across else 1e-4), case


def test_windows_across_ranks_keep_what_autograd_saves(counted):
    """Exactly: the layer with a window is compared with the same layer without one."""
    from programs import activation_bytes as known

    found = dict(zip(known.HALVES, counted["halves"], strict=True))
    cases = [case for case in known.HALVES if case[0].startswith("cp") and case[1].endswith(" window")]
    assert {case[1].split()[0] for case in cases} == {"gdn", "mamba2", "mla"}
    for layout, kind, *rest in cases:
        with_window, without = (layout, kind, *rest), (layout, kind.removesuffix(" window"), *rest)
        planned = _planned_layer(with_window)[0] - _planned_layer(without)[0]
        assert planned == found[with_window][0] - found[without][0], with_window


def _step_run(known, step, layout: ParallelLayout, global_batch: int) -> PlannedRun:
    student, teacher = known.step_models(step)
    return PlannedRun(
        student=student, teacher=teacher, kind=stage_kind(step.stage), loss=known.step_loss(step), layout=layout,
        work=Work(processes=layout.ranks, seq_length=known.STEP_LENGTH, micro_batch=known.ROWS,
                  global_batch=global_batch),
        train=step.train, recompute=step.recompute, recompute_chunk=step.recompute_chunk,
        mlp_block=step.mlp_block, recurrence_block=step.recurrence_block,
    )  # fmt: skip


def test_steps_peak_where_they_are_planned_to(counted):
    from programs import activation_bytes as known

    for step, got in zip(known.STEPS, counted["steps"], strict=True):
        run = _step_run(known, step, ParallelLayout(cp=step.cp, linear_cp=step.linear_cp), known.ROWS)
        planned = _beside_weights(peak(run, 0))
        if step.recurrence_block:  # copies of several sequences are planned high
            assert 0.98 * got <= planned <= 1.06 * got, step
        else:  # planned 2.4 % low: a step with frozen windows is fullest in the forward pass of the last one
            assert planned == pytest.approx(got, rel=0.03 if step.name == "ild window" else 0.02), step


def test_pipeline_stages_peak_where_they_are_planned_to(counted):
    from programs import activation_bytes as known

    for (stage, rank, micro_batches), got in zip(known.PIPELINES, counted["pipelines"], strict=True):
        step = known.Step("", "gdn", stage, "all")
        run = _step_run(known, step, ParallelLayout(pp=known.PP), known.ROWS * micro_batches)
        assert _beside_weights(peak(run, rank)) == pytest.approx(got, rel=0.02), (stage, rank, micro_batches)


def test_logits_of_three_chunks_at_most():
    assert logit_rows(tokens=4096, taught=4096, chunk=1024) == 3 * 1024
    assert logit_rows(tokens=1024, taught=1024, chunk=4096) == 2 * 1024
    assert logit_rows(tokens=4096, taught=1500, chunk=1024) == 2 * 1024 + 476
    assert logit_rows(tokens=4096, taught=0, chunk=1024) == 2 * 1024


def test_micro_batches_in_flight():
    arch = helpers.tiny.hybrid()
    run = PlannedRun(
        student=arch, teacher=arch.as_teacher(), kind=stage_kind("distill"), loss=KL(), layout=ParallelLayout(pp=4),
        work=Work(processes=8, seq_length=64, micro_batch=1, global_batch=6),
    )  # fmt: skip
    assert run.micro_batches == 3
    assert [in_flight(run, stage) for stage in range(4)] == [3, 3, 2, 1]
    assert [in_flight(replace(run, kind=stage_kind("ild")), stage) for stage in range(4)] == [1, 1, 1, 1]
