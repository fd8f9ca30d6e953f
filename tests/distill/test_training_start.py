"""What is refused before a training starts."""

import argparse
import json
import os
import shutil
import subprocess
import sys

import pytest

from hylo_megatron import train
from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny
from helpers import train as helpers

from hylo_megatron.checkpoint import iterations, read_ahead
from hylo_megatron.config import Architecture
from hylo_megatron.data.data_check import check_data
from hylo_megatron.data.prepare import MASK, prepare
from hylo_megatron.distill import command_line, first_flags, memory_check
from hylo_megatron.errors import HyLoError
from hylo_megatron.parent import ALONE, TASKS, without_launcher


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.make_world(tmp_path_factory.mktemp("world"))


def test_what_a_training_cannot_do_without_is_asked_for(world):
    """Without data Megatron would train on made-up tokens; a warm-up as long as the run it asserts against."""
    whole = list(map(str, helpers.train_flags(world, "ild", "x", lr_warmup_iters=3)))
    command_line.check_given(command_line.user_flags(whole), whole)
    for flag in ("--data-path", "--lr", "--seq-length", "--train-iters", "--micro-batch-size", "--hylo-stage"):
        at = whole.index(flag)
        rest = whole[:at] + whole[at + 2 :]
        with pytest.raises(HyLoError, match=f"^{flag} is missing"):
            command_line.check_given(command_line.user_flags(rest), rest)
    for more, words in (
        (["--eval-iters", "2"], "--eval-iters 2: no data to validate on"),
        (["--transformer-impl", "local"], "--hylo-backend says which layers are built"),
        (["--data-path", "nan", "a", "1", "b"], "--data-path: weight nan, expected a number above 0"),
        (["--data-path", "1", "a", "-2", "b"], "--data-path: weight -2, expected"),
        (["--fp8-format", "hybrid"], "--fp8-format: torch's layers do not multiply in FP8; give --hylo-backend te"),
        (["--fp8-format=e4m3"], "--fp8-format: torch's layers do not multiply in FP8"),
        (["--hylo-backend", "te", "--fp8-format=hybrid"], "--fp8-format: --hylo-stage ild runs each layer by itself"),
        (["--hylo-backend", "te", "--fp8-param-gather"], "--fp8-param-gather is not supported"),
        (["--overlap-param-gather"], "--overlap-param-gather is not supported: layers here read weights that"),
        (["--optimizer-cuda-graph"], "--optimizer-cuda-graph is not supported: the learning rate would stay"),
        (
            ["--cuda-graph-impl", "full_iteration", "--step-batch-size-schedule", "0:2 1K:4"],
            "--step-batch-size-schedule: --cuda-graph-impl full_iteration repeats the first step's number",
        ),
        (
            ["--cuda-graph-impl=full_iteration", "--pipeline-model-parallel-size", "2"],
            "--cuda-graph-impl full_iteration: --hylo-stage ild cannot be captured with --pipeline",
        ),
        (["--hylo-random-weights"], "--save: a benchmark with --hylo-random-weights loads and saves nothing"),
        (["--hylo-profile", "x"], "--hylo-profile: needs --train-iters of 5 or more, got 4"),
    ):
        longer = [*whole, *more]
        with pytest.raises(HyLoError, match=words):
            command_line.check_given(command_line.user_flags(longer), longer)
    with pytest.raises(HyLoError, match="--lr-warmup-iters 4: expected fewer than the 4 steps"):
        command_line.check_given(command_line.user_flags([*whole, "--lr-warmup-iters", "4"]), whole)


# ---- the order: what needs neither torch nor Megatron is refused before they are imported ----


REFUSED = [
    (dict(lr="nan"), "argument --lr: 'nan': expected"),
    (dict(hylo_techer=3), "unrecognized arguments: --hylo-techer"),
    (dict(hylo_teacher="/not/there"), "/not/there/hylo.json not found"),
    (dict(data_path="/not/there"), "/not/there.idx not found"),
    (dict(data_path="PACKED"), "packed to 9 tokens: --seq-length 64 needs sequences of 65"),
    (dict(load="/not/there"), "--load /not/there: has no checkpoint of a training"),
    (dict(fp16=True), "--fp16: training in fp16 is not supported"),
    (dict(tensor_model_parallel_size=7), "TP = 7 does not divide 4 attention heads"),
    (dict(hylo_temperature=2, hylo_on_spike="rollback", no_save_optim=True), "rollback needs the optimizer"),
    (dict(bf16=True, micro_batch_size=4096, global_batch_size=4096), "the fullest rank needs"),
]
WITHOUT_TORCH = """
import json, sys
from hylo_megatron import train
from hylo_megatron.distill import memory_check
memory_check.gpu_bytes = lambda index: 2**30
sys.modules["torch"] = sys.modules["megatron"] = None  # their import is an error
for argv in json.loads(sys.stdin.read()):
    sys.argv[1:] = argv
    try:
        train.main()
    except SystemExit as end:
        print("code", end.code, file=sys.stderr)
"""


def test_refusals_come_before_torch_and_megatron_are_imported(world, tmp_path):
    prepare([world["data"].parent / "text.jsonl"], world["student"] / "hf", tmp_path / "packed", pack_length=9)
    flags = [each | ({"data_path": tmp_path / "packed"} if "PACKED" in each.values() else {}) for each, _ in REFUSED]
    orders = [list(map(str, helpers.train_flags(world, "distill", tmp_path / "run", **each))) for each in flags]
    command, order = [sys.executable, "-c", WITHOUT_TORCH], json.dumps(orders)
    done = subprocess.run(command, input=order, capture_output=True, text=True, env=helpers.environment())
    lines = [line for line in done.stderr.splitlines() if line.startswith(("error: ", "code "))]
    assert done.returncode == 0 and len(lines) == 2 * len(REFUSED), done.stderr
    for (_, words), line, code in zip(REFUSED, lines[::2], lines[1::2], strict=True):
        assert line.startswith("error: ") and words in line and code == "code 2"
    assert not (tmp_path / "run").exists()


def test_checkpoints_without_weights_are_refused_and_the_teachers_are_read_ahead(world, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(read_ahead.os, "posix_fadvise", lambda file, *rest: asked.append(rest))
    for name in ("student", "teacher"):
        empty = shutil.copytree(world[name], tmp_path / name, ignore=shutil.ignore_patterns("release"))
        argv = helpers.train_flags(world | {name: empty}, "distill", "x")
        with pytest.raises(HyLoError, match=f"^{empty}/release: .* names it, but it is incomplete"):
            command_line.check_command_line(list(map(str, argv)))
        assert not asked
    argv = helpers.train_flags(world, "distill", "x", student=tmp_path / "student", hylo_student_iteration=4)
    command_line.check_command_line(list(map(str, argv)))  # the student's are not there yet
    shutil.copytree(world["student"] / "release", tmp_path / "run" / "iter_0000002")
    argv = helpers.train_flags(world, "distill", tmp_path / "run", student=tmp_path / "student")
    command_line.check_command_line(list(map(str, argv)))  # a run that goes on does not need them
    thread = read_ahead.read_ahead(iterations.latest(world["teacher"]))
    thread.join()
    assert asked and set(asked) == {(0, 0, read_ahead.os.POSIX_FADV_WILLNEED)}


@pytest.mark.parametrize("flags, gib, words", [
    ({}, 1.0, "needs .* GiB by the planner's count, and the GPU has 1.0; lower --micro-batch-size"),
    ({}, 80.0, None), (dict(no_memory_check=True), 1.0, None), (dict(use_precision_aware_optimizer=True), 1.0, None),
    (dict(recompute_granularity="selective"), 1.0, None),
], ids=["too little", "enough", "not asked", "not counted", "not counted either"])  # fmt: skip
def test_a_run_that_cannot_fit_the_gpu_is_refused(world, monkeypatch, flags, gib, words):
    monkeypatch.setattr(memory_check, "gpu_bytes", lambda index: int(gib * 2**30))
    large = dict(bf16=True, micro_batch_size=4096, global_batch_size=4096)
    argv = list(map(str, helpers.train_flags(world, "distill", "x", **large, **flags)))
    if words is None:
        assert command_line.check_command_line(argv).is_hybrid
        return
    with pytest.raises(HyLoError, match=words):
        command_line.check_command_line(argv)


def test_a_run_that_nearly_fills_the_gpu_is_warned(world, capsys):
    known = first_flags.first_flags(list(map(str, helpers.train_flags(world, "distill", "x", bf16=True))))
    student = Architecture.load(world["student"])
    run = memory_check.planned_run(known, student, *command_line.check_models(known, student))
    peak = max(each.total for each in memory_check.peaks(run))
    memory_check.check_memory(run, [], peak + memory_check.BESIDE)
    assert not capsys.readouterr().err
    for memory in (peak, int(peak / memory_check.SURE) + 1):
        memory_check.check_memory(run, [], memory)
        assert capsys.readouterr().err.startswith("warning: memory: the fullest rank needs")
    with pytest.raises(HyLoError, match="^memory: "):
        memory_check.check_memory(run, [], int(peak / memory_check.SURE) - 1)


# ---- tokens ----


def test_tokens_belong_to_the_models_and_their_tokenizer(world, tmp_path):
    student, teacher = (Architecture.load(world[name]) for name in ("student", "teacher"))
    hf = world["student"] / "hf"
    check_data([str(world["data"])], student, teacher, hf)
    text = tmp_path / "text.jsonl"
    text.write_text(json.dumps({"text": " ".join(f"w{i % tiny.VOCAB}" for i in range(500))}))
    # another tokenizer of the same size: two words have changed places
    shutil.copytree(hf, tmp_path / "other")
    content = json.loads((hf / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary["w7"], vocabulary["w8"] = vocabulary["w8"], vocabulary["w7"]
    (tmp_path / "other" / "tokenizer.json").write_text(json.dumps(content))
    prepare([text], tmp_path / "other", tmp_path / "other-tokens")
    with pytest.raises(HyLoError, match="made with another tokenizer"):
        check_data([str(world["data"]), str(tmp_path / "other-tokens")], student, teacher, hf)
    # a larger one, and the files of a program that writes no PREFIX.json
    (tmp_path / "other" / "config.json").unlink()  # its vocab_size would be held against the tokenizer at once
    tiny.write_tokenizer(tmp_path / "other", tiny.VOCAB + 20)
    (tmp_path / "last.jsonl").write_text(json.dumps({"text": f"w5 w{tiny.VOCAB + 10} w6"}))
    prepare([tmp_path / "last.jsonl"], tmp_path / "other", tmp_path / "larger")
    (tmp_path / "larger.json").unlink()
    with pytest.raises(HyLoError, match=f"larger.bin: token .* is .*, expected 0 to {tiny.VOCAB - 1}"):
        check_data([str(tmp_path / "larger")], student, teacher, hf)


def test_a_student_that_nobody_trains_is_not_waited_for(world, tmp_path, monkeypatch):
    with pytest.raises(HyLoError, match="it is a finished student"):
        iterations.check_still_trains(world["student"], 4)
    iterations.check_still_trains(tmp_path / "not-there-yet", 4)
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("8")
    with pytest.raises(HyLoError, match="is at iteration 8 already"):
        iterations.check_still_trains(tmp_path, 4)
    iterations.check_still_trains(tmp_path, 12)
    written = (tmp_path / "latest_checkpointed_iteration.txt").stat().st_mtime
    with pytest.raises(HyLoError, match="nothing was written there for 60 minutes"):
        iterations.check_still_trains(tmp_path, 12, now=written + 3600)
    gone = [tmp_path / "saved-meanwhile.partial", *tmp_path.iterdir()]
    monkeypatch.setattr(type(tmp_path), "iterdir", lambda _: iter(gone))
    iterations.check_still_trains(tmp_path, 12)


@pytest.mark.parametrize("iteration, order", [
    (4, ["results", "wait_for_student", "check_room", "check_kernels"]),
    (None, ["results", "check_room", "check_kernels"]),
])  # fmt: skip
def test_no_kernel_is_timed_while_the_student_is_trained(monkeypatch, iteration, order):
    """A recipe starts the next stage on the GPU that still trains the student."""
    done = []
    monkeypatch.setattr(train, "install", done.append)
    for name in ("wait_for_student", "check_room", "check_kernels"):
        monkeypatch.setattr(train, name, lambda *_, name=name: done.append(name))
    train.get_ready(argparse.Namespace(hylo_student_iteration=iteration), None, None)
    assert done == order


@pytest.mark.parametrize("variable", TASKS)
def test_tasks_without_ranks_do_not_train_alone(monkeypatch, variable):
    environment = {name: value for name, value in os.environ.items() if name not in (*ALONE, *TASKS)}
    monkeypatch.setattr(os, "environ", environment | {variable: "2"})
    with pytest.raises(HyLoError, match=f"{variable} is 2, and no task has a RANK"):
        without_launcher()
    assert not ALONE.keys() & os.environ.keys()
    for more in ({variable: "1"}, {variable: "2", "RANK": "1"}):
        monkeypatch.setattr(os, "environ", environment | more)
        without_launcher()
        assert os.environ["RANK"] == more.get("RANK", "0")


@pytest.mark.slow
def test_one_process_needs_no_launcher(world, tmp_path):
    environment = {name: value for name, value in helpers.environment().items() if name not in ALONE}
    flags = helpers.train_flags(world, "distill", tmp_path / "run", train_iters=1, lr_warmup_iters=0)
    done = subprocess.run(helpers.train_command(*flags), capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    assert len(helpers.read_log(tmp_path / "run" / "train_log.jsonl")) == 1


@pytest.mark.slow
@pytest.mark.parametrize("flags, words", [
    (dict(recompute_granularity="full"), "recompute_method must be"),
    (dict(fp16=True, bf16=True), "assert not args.bf16"),
    (dict(multi_latent_attention=True), "mutually exclusive"),
], ids=lambda value: next(iter(value)) if isinstance(value, dict) else "")  # fmt: skip
def test_what_megatron_asserts_is_one_line(world, tmp_path, flags, words):
    said = helpers.refusal(helpers.train(*helpers.train_flags(world, "distill", tmp_path / "run", **flags)))
    assert said.startswith("error: Megatron refuses these flags: ") and words in said
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_steps_without_a_token_to_learn_count_zero(world, tmp_path):
    prepare([world["data"].parent / "text.jsonl"], world["student"] / "hf", tmp_path / "packed", pack_length=65)
    sequences = json.loads((tmp_path / "packed.json").read_text())["sequences"]
    (tmp_path / f"packed{MASK}").write_bytes(bytes(65 * sequences))
    for stage in ("ild", "distill"):
        run = tmp_path / stage
        flags = helpers.train_flags(world, stage, run, train_iters=2, lr_warmup_iters=0, data_path=tmp_path / "packed")
        done = helpers.train(*flags, "--micro-batch-size", "4")
        assert done.returncode == 0, done.stderr[-3000:]
        lines = helpers.read_log(run / "train_log.jsonl")
        assert [(line["loss"], line["learnt"], line["grad_norm"]) for line in lines] == [(0.0, 0.0, 0.0)] * 2
        assert "no token of step 1 is in the loss" in done.stdout
