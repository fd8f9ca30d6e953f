"""The folders of a training, ``--save`` and ``--load``: whose run they may hold, and what a run that goes on keeps."""

import shutil
from dataclasses import replace

import pytest

from hylo_megatron import train
from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers

from hylo_megatron.config import Architecture, MLAGeometry
from hylo_megatron.distill import first_flags, resume
from hylo_megatron.distill.arguments import student_architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import only_writer


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.make_world(tmp_path_factory.mktemp("world"))


def test_a_folder_with_the_run_of_another_student_is_refused(world, tmp_path):
    def check(save, **changes):
        argv = map(str, helpers.train_flags(world, "distill", save, **changes))
        known = first_flags.first_flags(list(argv))
        resume.check_save(known, student_architecture(known))

    student, run = Architecture.load(world["student"]), tmp_path / "run"
    others = (
        replace(student, hidden_size=128), replace(student, plan=student.plan[1:] + student.plan[:1]),
        replace(student, geometry=replace(student.geometry, mla=MLAGeometry(8, 8, 8, 8))),
    )  # fmt: skip
    run.mkdir()
    (run / "latest_checkpointed_iteration.txt").write_text("2")
    for other in (replace(student, max_position_embeddings=999, extra={}), *others):
        other.save(run)
        for changes in (dict(save=run), dict(save=tmp_path / "new", load=run)):
            if other in others:
                with pytest.raises(HyLoError, match="run holds a run of another student; choose another folder"):
                    check(**changes)
            else:
                check(**changes)
    (run / "latest_checkpointed_iteration.txt").unlink()  # the last of the others has saved nothing yet
    check(run)


@pytest.mark.slow
def test_two_trainings_do_not_write_one_folder(world, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    with only_writer(run / train.RUNNING, "the other training"):
        said = helpers.refusal(helpers.train(*helpers.train_flags(world, "distill", run)))
    assert said.startswith(f"error: --save {run}: another process is writing it; wait for its end, or choose another")
    assert said.endswith(f"remove {run / train.RUNNING}")
    assert not list(run.iterdir())


def rates(folder) -> list[float]:
    return [line["lr"] for line in helpers.read_log(folder / "train_log.jsonl")]


@pytest.mark.slow
def test_resume_with_another_schedule(world, tmp_path):
    run, first = tmp_path / "run", dict(train_iters=4, lr_decay_style="linear", lr_warmup_iters=0)
    start = helpers.train(*helpers.train_flags(world, "distill", run, **first))
    assert start.returncode == 0, start.stderr[-3000:]

    def again(**changes):
        return helpers.train(*helpers.train_flags(world, "distill", run, **{**first, **changes}))

    said = helpers.refusal(again(train_iters=6, lr=2e-3))
    assert "--lr (max_lr 0.002, was 0.001)" in said and "--train-iters (lr_decay_steps 24, was 16)" in said
    assert "--override-opt_param-scheduler" in said and len(rates(run)) == 4
    assert "--hylo-copied-lr-mult is 0.5, the run in" in helpers.refusal(again(train_iters=6, hylo_copied_lr_mult=0.5))

    shutil.copytree(run, kept := tmp_path / "kept")
    done = again(train_iters=6, lr=2e-3, override_opt_param_scheduler=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert rates(run)[4:] == pytest.approx([2e-3 * 1 / 6, 0.0], abs=1e-9)  # the new peak, on the new way down
    flags = {**first, "train_iters": 6, "lr": 2e-3, "use_checkpoint_opt_param_scheduler": True}
    done = helpers.train(*helpers.train_flags(world, "distill", kept, **flags))
    assert done.returncode == 0, done.stderr[-3000:]
    assert rates(kept)[4:] == [0.0, 0.0]  # the old one was at its end


def test_a_run_that_goes_on_keeps_what_layers_do_with_positions(world, tmp_path):
    def start(save="run", **changes):
        argv = map(str, helpers.train_flags(world, "distill", tmp_path / save, **changes))
        known = first_flags.first_flags(list(argv))
        resume.check_save(known, student_architecture(known))
        train.write_companions(known)

    changes = dict(hylo_mla_rope="off", hylo_log_scale="600", hylo_linear_rope="on", hylo_rope='{"rope_theta": 4e5}')
    start()
    start(**changes)  # without a checkpoint the run starts anew
    shutil.copytree(world["student"] / "release", tmp_path / "run" / "iter_0000002")
    start(**changes)
    for name in changes:
        rest = {flag: value for flag, value in changes.items() if flag != name}
        for more in ({}, dict(save="other", load=tmp_path / "run")):
            with pytest.raises(HyLoError, match=f"^--{name.replace('_', '-')}: .* a run that goes on keeps it"):
                start(**rest, **more)
    start(save="other", load=tmp_path / "run", finetune=True)
    arch = Architecture.load(tmp_path / "run")
    assert not arch.mla_rope and arch.linear_rope and arch.log_scale and arch.rope_parameters["rope_theta"] == 4e5
