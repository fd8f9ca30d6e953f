"""``python -m hylo_megatron.train`` as a user runs it, and one step on every layout against one process."""

import signal
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402
from helpers.train import read_log, train, train_flags  # noqa: E402
from programs import parity  # noqa: E402

from hylo_megatron.checkpoint import disk  # noqa: E402
from hylo_megatron.config import Architecture, Plan  # noqa: E402
from hylo_megatron.distill import resume  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.init.upcycle import upcycle  # noqa: E402

LOSSES = ("loss", "kl", "ce", "grad_norm", "lr")


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.make_world(tmp_path_factory.mktemp("world"))


def succeeded(done: subprocess.CompletedProcess) -> None:
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]


def losses(folder) -> list[tuple]:
    lines = read_log(folder / "train_log.jsonl")
    assert [line["iteration"] for line in lines] == list(range(1, len(lines) + 1))
    return [tuple(line[key] for key in LOSSES) for line in lines]


# ---- both stages, then the exported model ----


def test_layer_by_layer_on_a_pipeline_then_end_to_end_then_export(world, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hylo_megatron.hf  # noqa: F401
    from hylo_megatron.convert import megatron_to_hf

    ild, out = tmp_path / "ild", tmp_path / "distill"
    succeeded(train(*train_flags(world, "ild", ild, pipeline_model_parallel_size=2), processes=2))
    lines = read_log(ild / "train_log.jsonl")
    assert [line["iteration"] for line in lines] == [1, 2, 3, 4]
    for line in lines:
        assert torch.tensor(line["layers"]).shape == (4, 2)
        assert all(value > 0 for layer in line["layers"] for value in layer)
        assert sum(map(sum, line["layers"])) == pytest.approx(line["loss"], abs=1e-4)
    before, after = helpers.trained_weights(world["student"]), helpers.trained_weights(ild)
    assert before.keys() == after.keys()
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if ".self_attention." in name}

    # the teacher of the second stage is wider and deeper than the base
    succeeded(train(*train_flags(world, "distill", out, student=ild, teacher="big")))
    assert len(losses(out)) == 4
    unchanged = {n for n, tensor in helpers.trained_weights(out).items() if torch.equal(tensor, after[n])}
    assert not unchanged
    megatron_to_hf.convert(out, tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    prompt = AutoTokenizer.from_pretrained(tmp_path / "hf")("w5 w6 w7", return_tensors="pt")
    prompt.pop("token_type_ids", None)
    text = model.generate(**prompt, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert text.shape == (1, 8)
    embedding = helpers.trained_weights(out)["embedding.word_embeddings.weight"]
    assert torch.equal(model.get_input_embeddings().weight, embedding)


def test_rotation_is_dropped_at_the_start_of_a_stage_and_stays_so(world, tmp_path):
    """The first step starts from the loss of the changed student; later stages and the export follow it."""
    from hylo_megatron.convert import megatron_to_hf
    from hylo_megatron.hf import HyLoConfig

    changes = dict(hylo_mla_rope="off", hylo_log_scale="9,16")
    first, plain, then = (tmp_path / name for name in ("first", "plain", "then"))
    short = dict(train_iters=2, lr_warmup_iters=1)
    succeeded(train(*train_flags(world, "distill", first, **short, **changes)))
    succeeded(train(*train_flags(world, "distill", plain, **short)))
    assert abs(losses(first)[0][0] - losses(plain)[0][0]) > 1e-4
    succeeded(train(*train_flags(world, "distill", then, student=first, **short)))
    for folder in (first, then):
        arch = Architecture.load(folder)
        assert not arch.mla_rope and arch.log_scale == {"base": 9.0, "length": 16}
    megatron_to_hf.convert(then, tmp_path / "hf", settings={"log_scale": None})
    config = HyLoConfig.from_pretrained(tmp_path / "hf")
    assert not config.mla_rope and config.log_scale is None
    refused = train(*train_flags(world, "distill", tmp_path / "no", hylo_mla_rope="none"))
    assert "argument --hylo-mla-rope: 'none': expected on or off" in refused.stderr


# ---- stop and go ----


@pytest.fixture(scope="module")
def uninterrupted(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    succeeded(train(*train_flags(world, "distill", folder, train_iters=20)))
    assert len(losses(folder)) == 20
    return folder


def test_a_stopped_run_continues_bit_for_bit(world, uninterrupted, tmp_path):
    run = tmp_path / "run"
    flags = train_flags(world, "distill", run, train_iters=20, exit_interval=10)
    succeeded(train(*flags))
    assert losses(run) == losses(uninterrupted)[:10]
    succeeded(train(*flags))
    assert losses(run) == losses(uninterrupted)
    tiny.same_bits(helpers.trained_weights(run), helpers.trained_weights(uninterrupted))


def test_a_killed_run_continues_bit_for_bit(world, uninterrupted, tmp_path):
    run = tmp_path / "run"
    away = dict(hylo_offload_teacher=True, hylo_offload_optimizer=True)  # which changes no bit either
    log, flags = run / "train_log.jsonl", train_flags(world, "distill", run, train_iters=20, save_interval=5, **away)
    killed = train(*flags, HYLO_TEST_KILL_AT="8")
    assert killed.returncode == -signal.SIGKILL and len(read_log(log)) == 8, killed.stderr[-4000:]
    done = train(*flags)
    succeeded(done)
    assert "at iteration 0" not in done.stdout  # it loaded step 5, or the losses below prove nothing
    assert losses(run) == losses(uninterrupted)
    tiny.same_bits(helpers.trained_weights(run), helpers.trained_weights(uninterrupted))


def test_bf16_runs_saves_and_resumes(world, tmp_path):
    run = tmp_path / "run"
    flags = train_flags(world, "distill", run, train_iters=4, exit_interval=2, bf16=True, hylo_last_weights_only=True)
    for steps in (2, 4):
        succeeded(train(*flags))
        assert len(losses(run)) == steps
    fewer = train_flags(world, "distill", run, train_iters=3, exit_interval=2, bf16=True, hylo_last_weights_only=True)
    succeeded(train(*fewer))  # a finished run starts and ends again, also where it has done more than is asked for
    assert len(losses(run)) == 4
    before, last = (run / f"iter_{step:07d}" for step in (2, 4))
    assert disk.used(before) > 2 * disk.used(last)  # the last step has no optimizer
    asked = SimpleNamespace(finetune=False, no_load_optim=False, train_iters=6)
    with pytest.raises(HyLoError, match="iter_0000004 has no optimizer's states, expected .* --hylo-student"):
        resume.check(last, object(), None, asked)
    resume.check(last, object(), None, SimpleNamespace(finetune=False, no_load_optim=False, train_iters=4))
    assert not resume.has_no_optimizer(before, asked)
    assert all(0 < loss < 100 for loss, *_ in losses(run))
    for name, tensor in helpers.trained_weights(run).items():
        assert tensor.dtype == (torch.float32 if name.endswith(("A_log", "dt_bias")) else torch.bfloat16), name


# ---- what cannot work ends at once, in one line ----

BAD = {
    "no student": (dict(hylo_student=None), ("--hylo-student is missing", "hylo upcycle")),
    "another vocabulary": (dict(teacher="foreign"), ("vocabularies differ", "320", "300")),
    "ild from a deeper teacher": (dict(stage="ild", teacher="deep"), ("--hylo-stage ild", "4 layers")),
    "ranks that do not divide": (dict(tensor_model_parallel_size=2), ("GDN key heads", "TP = 2", "nearest")),
    "heads that an all-to-all cannot deal out": (
        dict(context_parallel_size=2, hylo_linear_cp="a2a"), ("3 GDN key heads", "TP x CP = 2")),
    "an exchange that attention has not": (
        dict(context_parallel_size=2, cp_comm_type="a2a"), ("--cp-comm-type a2a", "p2p", "all_gather", "auto")),
    "virtual stages of a schedule that has none": (
        dict(stage="ild", pipeline_model_parallel_size=2, num_virtual_stages_per_pipeline_rank=2),
        ("--hylo-stage ild", "virtual pipeline")),
    "a Transformer as student": (dict(student="teacher"), ("is a Transformer", "hylo upcycle")),
    "a checkpoint that is not there": (dict(teacher="data"), ("hylo.json not found",)),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_ends_in_one_line(case, world, tmp_path, monkeypatch, capsys):
    from hylo_megatron.train import main

    parity.unset_global_variables()  # of the case before
    changes, words = BAD[case]
    argv = train_flags(world, changes.get("stage", "distill"), tmp_path / "run", **{
        key: value for key, value in changes.items() if key not in ("stage", "hylo_student")
    })  # fmt: skip
    if "hylo_student" in changes:
        place = argv.index("--hylo-student")
        del argv[place : place + 2]
    monkeypatch.setattr(sys, "argv", ["train", *argv])
    for name, value in dict(RANK="0", WORLD_SIZE="2" if any("parallel" in key for key in changes) else "1",
                            CUDA_DEVICE_MAX_CONNECTIONS="1").items():  # fmt: skip
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as ended:
        main()
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert ended.value.code == 2
    assert len(errors) == 1
    assert all(word in errors[0] for word in words), errors[0]
    assert not (tmp_path / "run").exists()


def test_bad_input_as_a_command(world, tmp_path):
    done = train(*train_flags(world, "ild", tmp_path / "run", teacher="deep"))
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("error: --hylo-stage ild compares layer by layer")
    assert "Traceback" not in done.stderr


# ---- context parallelism ----


def test_context_parallelism_by_the_command_line(world, tmp_path):
    student = tmp_path / "student"  # of six heads, which an all-to-all can deal out
    upcycle(world["big"], student, Plan.parse(6, "0,3", "gdn"), tokens_BS=tiny.tokens(4, helpers.SEQ), log=str)

    def losses(name, processes, **flags):
        argv = helpers.train_flags(world, "distill", tmp_path / name, str(student), "big", **flags)
        succeeded(helpers.train(*argv, processes=processes))
        return [line["loss"] for line in read_log(tmp_path / name / "train_log.jsonl")]

    alone = losses("alone", 1)
    for comm, linear_cp in (("p2p", "a2a"), ("all_gather", "auto")):
        halves = losses(comm, 2, context_parallel_size=2, cp_comm_type=comm, hylo_linear_cp=linear_cp)
        assert len(halves) == 4 and halves == pytest.approx(alone, rel=1e-5)


def test_context_parallelism_of_heads_that_do_not_divide(world, tmp_path):
    """Nobody has to ask for states; activations are computed again, so states are sent twice."""
    assert Architecture.load(world["student"]).geometry.gdn.num_key_heads % 2
    again = dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1)
    succeeded(train(*train_flags(world, "distill", tmp_path / "alone")))
    shared = train_flags(world, "distill", tmp_path / "shared", context_parallel_size=2, **again)
    succeeded(train(*shared, processes=2))
    alone, halves = ([line[0] for line in losses(tmp_path / name)] for name in ("alone", "shared"))
    assert len(halves) == 4 and halves == pytest.approx(alone, rel=1e-5)
