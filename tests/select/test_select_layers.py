"""``hylo select-layers``: the one layer that matters is found, from a cache or on several ranks alike."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny
from helpers.train import torchrun
from safetensors.torch import load_file, save_file

from hylo_megatron.config import Architecture, Plan, geometry_preset
from hylo_megatron.config.student import student_architecture
from hylo_megatron.convert import assemble, hf_to_megatron, megatron_to_hf
from hylo_megatron.data.token_writer import token_files
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.models import load
from hylo_megatron.init.upcycle import main as upcycle_command
from hylo_megatron.init.upcycle import upcycle
from hylo_megatron.planner.command import main as plan_command
from hylo_megatron.recipes.smollm2 import smollm2_cpu
from hylo_megatron.select import command, gates, judge
from hylo_megatron.select.cache import Cache, layers_of, name_of
from hylo_megatron.select.distilled import measure_distilled
from hylo_megatron.select.gates import GateState, GateTraining, gated, gates_of
from hylo_megatron.select.judge import Judge, Measured
from hylo_megatron.select.models import load_pair
from hylo_megatron.select.ranking import NONE, Bench, Score, greedy, one_by_one
from hylo_megatron.select.ranks import Ranks
from hylo_megatron.select.rows import Rows
from hylo_megatron.select.training import Training

LENGTH, SAMPLES = 32, 6
MATTERS = {"teacher": 1, "other": 3}  # of 4 layers; a blind choice of one is 0, a uniform one 2
CPU = torch.device("cpu")


def silence(source: Path, folder: Path, kept: tuple[int, ...] = ()) -> None:
    """Copy a model with the output projections of mixers set to zero, except those of the layers ``kept``."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(".o_proj.weight") and int(name.split(".")[2]) not in kept:
            tensor.zero_()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def write_samples(prefix: Path, model) -> None:
    """Write rows as retrieval samples; the last 8 tokens, which are marked, are what ``model`` expects there."""
    rows, answers = tiny.tokens(SAMPLES, LENGTH, seed=3), np.zeros((SAMPLES, LENGTH), np.uint8)
    answers[:, -8:] = 1
    for place in range(LENGTH - 8, LENGTH):
        rows[:, place] = model(rows[:, :place]).logits[:, -1].argmax(-1)
    with token_files(prefix, tiny.VOCAB, (".answers.npy", ".json")) as (builder, partial):
        for row in rows.numpy():
            builder.add_document(row, [LENGTH])
        with partial[".answers.npy"].open("wb") as file:
            np.save(file, answers)
        summary = {"dtype": builder.dtype.__name__, "sequences": SAMPLES, "pack_length": LENGTH}
        partial[".json"].write_text(json.dumps(summary))


@pytest.fixture(scope="module")
def world(tmp_path_factory) -> Path:
    """``teacher`` and ``other`` attend in one layer each; linear layers of ``student`` add nothing.

    ``base`` and ``linear`` are the checkpoints before that. ``text.jsonl`` and ``samples`` are rows to measure on.
    """
    world = tmp_path_factory.mktemp("select")
    model = tiny.teacher_model("llama", tie_word_embeddings=False)
    model.lm_head.weight.data *= 3  # far from uniform, so that a loss of answers shows
    tiny.save_model(model, world / "hf")
    hf_to_megatron.convert(world / "hf", world / "base")
    upcycle(world / "base", world / "linear", ("gdn",) * 4, init="svd", log=list)
    megatron_to_hf.convert(world / "linear", world / "linear-hf")
    for name, layer in MATTERS.items():
        silence(world / "hf", world / name, kept=(layer,))
    silence(world / "linear-hf", world / "student")
    lines = [" ".join(f"w{n}" for n in row) for row in tiny.tokens(64, 40, seed=1).tolist()]
    (world / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    write_samples(world / "samples", load(world / "teacher", CPU, torch.float32).model)
    return world


def flags(world, out, *more, method="smart", budget=("--mla", 1)) -> list[str]:
    """Return the flags of a selection. ``more`` overrides earlier ones."""
    given = ["--method", method, "--teacher", world / "teacher", "--out", out, *budget]
    if method not in command.FIXED:
        given += ["--student", world / "student", "--text", world / "text.jsonl", "--tokens", 256, "--length", LENGTH]
    return [str(flag) for flag in (*given, *more)]


def select(world, out, *more, **settings) -> dict:
    command.main(flags(world, out, *more, **settings))
    return json.loads((out / "plan.json").read_text())


def refused(capsys, *arguments, **settings) -> str:
    with pytest.raises(SystemExit):
        command.main(flags(*arguments, **settings))
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return error


# ---- the layer that matters ----


@pytest.mark.parametrize("teacher", MATTERS)
def test_the_layer_that_matters_is_found(world, tmp_path, capsys, teacher):
    """Two teachers that differ in this layer alone: no score that is blind to the models finds both."""
    plan = select(world, tmp_path, "--teacher", world / teacher)
    scores = {int(layer): score for layer, score in plan["scores"].items()}
    assert scores.pop(MATTERS[teacher]) == pytest.approx(1, abs=1e-4)  # restored, the student is the teacher
    assert all(abs(score) < 1e-4 for score in scores.values())
    assert plan["mla_layers"] == [MATTERS[teacher]] and plan["plan"] == "1MLA3GDN"
    assert f"layer   {MATTERS[teacher]}  score  1.0000  MLA" in capsys.readouterr().out
    assert (tmp_path / "scores.png").stat().st_size > 1000
    assert Plan.parse(4, "uniform:1").index("mla") != MATTERS[teacher]


def test_restored_layers_compute_what_the_base_model_computes(world):
    """With attention restored everywhere, the student of ``hylo upcycle`` is the base model again, and only then."""
    pair = load_pair(world / "hf", world / "linear-hf", CPU, torch.float32)
    ids = tiny.tokens(2, 48)
    before = pair.student(ids).logits
    with pair.restored(range(4)) as student:
        torch.testing.assert_close(student(ids).logits, pair.teacher(ids).logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(pair.student(ids).logits, before)
    assert (before - pair.teacher(ids).logits).abs().max() > 0.1


def test_measurements_equal_the_plain_formulas(world, monkeypatch):
    pair = load_pair(world / "hf", world / "linear-hf", CPU, torch.float32)
    ids, answers = tiny.tokens(3, 40), torch.rand(3, 40, generator=torch.Generator().manual_seed(0)) < 0.2
    monkeypatch.setattr(judge, "CHUNK", 7)
    rows = Rows(text_BS=ids, samples_BS=ids, answers_BS=answers)
    measured = Judge(pair.teacher, rows, batch_size=2)(pair.student)
    with torch.no_grad():
        log_t, log_s = (model(ids).logits.log_softmax(-1) for model in (pair.teacher, pair.student))
    assert measured.kl == pytest.approx((log_t.exp() * (log_t - log_s)).sum(-1).mean().item(), rel=1e-4)
    found = log_s[:, :-1].gather(-1, ids[:, 1:, None])[..., 0][answers[:, 1:]]
    assert measured.answer_loss == pytest.approx(-found.mean().item(), rel=1e-4)


# ---- scores and order ----


class Table:
    """Stands in for models: the divergence is what ``closed`` leaves of 10."""

    def __init__(self, closed):
        self.closed, self.asked = closed, []

    def __call__(self, layers):
        self.asked.append(name_of(layers))
        return Measured(kl=10 - self.closed(layers))

    def bench(self, folder) -> Bench:
        return Bench(self, Cache(folder, {}), Ranks(), log=list)


def redundant(layers) -> float:
    """Layers 0 and 1 do the same work: beside one of them, layer 2 closes more."""
    return 5 * bool(layers & {0, 1}) + 3 * (2 in layers) + 0.1 * (1 in layers)


def test_greedy_looks_again_beside_what_is_restored(tmp_path):
    table = Table(redundant)
    bench, score = table.bench(tmp_path), Score(base=Measured(kl=10))
    assert one_by_one(bench, score, 4).order == (1, 0, 2, 3)
    ranking = greedy(bench, score, 4, count=2)
    assert ranking.order[:2] == (1, 2) and set(ranking.order) == {0, 1, 2, 3}
    assert ranking.rounds[0] == pytest.approx({0: 0.5, 1: 0.51, 2: 0.3, 3: 0})
    assert ranking.rounds[1] == pytest.approx({0: 0, 2: 0.3, 3: 0})
    assert table.asked == ["none", "0", "1", "2", "3", "0+1", "1+2", "1+3"]  # nothing twice


def test_a_score_is_the_share_of_the_way_to_the_teacher():
    base, after = Measured(kl=2.0, answer_loss=5.0), Measured(kl=1.5, answer_loss=2.0)
    assert Score(base=base)(base, after) == pytest.approx(0.25)
    assert Score(base=base, teacher=1.0, weight=1.0)(base, after) == pytest.approx(0.75)
    assert Score(base=base, teacher=1.0, weight=0.4)(base, after) == pytest.approx(0.6 * 0.25 + 0.4 * 0.75)
    with pytest.raises(HyLoError, match="--retrieval: the teacher's loss of answers is 5.000"):
        Score(base=base, teacher=5.0, weight=0.5)
    with pytest.raises(HyLoError, match="the all-linear student equals its teacher"):
        Score(base=Measured(kl=0.0))


def test_answers_have_a_weight_in_the_score(world, tmp_path):
    """The weight reaches the score, and scores of all weights come from the same measurements."""
    samples = ("--retrieval", world / "samples", "--retrieval-samples", 4, "--retrieval-weight")
    alone, mixed, none = (select(world, tmp_path, *samples, weight)["scores"] for weight in (1, 0.25, 0))
    assert alone.pop(str(MATTERS["teacher"])) == pytest.approx(1, abs=1e-4)
    assert max(alone.values()) < 1e-4
    for layer, score in alone.items():
        assert mixed[layer] == pytest.approx(0.25 * score + 0.75 * none[layer])


# ---- methods that train ----


def test_distillation_helps_and_leaves_no_trace(world):
    pair = load_pair(world / "hf", world / "linear-hf", CPU, torch.float32)
    before = {name: tensor.clone() for name, tensor in pair.student.state_dict().items()}
    text, training = tiny.tokens(8, LENGTH), Training(steps=12, batch=4, lr=3e-3)
    judged = Judge(pair.teacher, Rows(text_BS=text))
    found = measure_distilled(pair, judged, training, text, frozenset({0}))
    with pair.restored({0}) as student:
        assert found.kl < 0.9 * judged(student).kl
    tiny.same_bits(pair.student.state_dict(), before)
    assert not any(parameter.requires_grad for parameter in pair.student.parameters())


@pytest.mark.parametrize("teacher", MATTERS)
def test_short_distillations_find_the_layer(world, tmp_path, teacher):
    more = ("--teacher", world / teacher, "--steps", 2, "--train-tokens", 256, "--train-batch", 4)
    plan = select(world, tmp_path, *more, method="kl")
    assert plan["mla_layers"] == [MATTERS[teacher]]
    assert max(plan["scores"].values()) > 2 * sorted(plan["scores"].values())[-2]


@pytest.mark.parametrize("teacher, weight", [("teacher", 0), ("other", 0), ("teacher", 1)])
def test_gates_find_the_layer(world, tmp_path, teacher, weight):
    more = ["--teacher", world / teacher, "--steps", 30, "--lr", 0.3, "--train-tokens", 256, "--train-batch", 4]
    if weight:
        more += ["--retrieval", world / "samples", "--retrieval-samples", 2, "--retrieval-weight", weight]
    plan = select(world, tmp_path, *more, method="gates")
    assert plan["mla_layers"] == [MATTERS[teacher]]
    assert plan["scores"][str(MATTERS[teacher])] > 0.7
    assert sum(plan["scores"].values()) == pytest.approx(1, abs=1e-4)


def test_gates_keep_the_budget_and_know_its_gradient():
    logits = torch.tensor([-2.0, 0.5, 3.0, 0.1], dtype=torch.float64, requires_grad=True)
    for budget in (0.3, 2.0, 3.7):
        assert gates_of(logits, budget).sum().item() == pytest.approx(budget)
        assert torch.autograd.gradcheck(lambda x, total=budget: gates_of(x, total), logits)


def gate_training(world, **changes) -> GateTraining:
    pair = load_pair(world / "hf", world / "linear-hf", CPU, torch.float32)
    answers = torch.rand(8, LENGTH, generator=torch.Generator().manual_seed(0)) < 0.2
    rows = Rows(text_BS=tiny.tokens(8, LENGTH), samples_BS=tiny.tokens(8, LENGTH, seed=2), answers_BS=answers)
    score = Score(base=Measured(kl=1.0, answer_loss=6.0), teacher=2.0, weight=0.5)
    training = Training(steps=6, batch=4, lr=0.1)
    return GateTraining(**(dict(pair=pair, training=training, rows=rows, score=score, count=1) | changes))


def test_interrupted_gates_go_on(world, tmp_path, monkeypatch):
    training = gate_training(world)

    def run(name):
        return training(GateState.begin(tmp_path / name, 4, 0.1), Ranks(), log=list).scores

    whole = run("whole")
    monkeypatch.setattr(gates, "SAVE_EVERY", 2)
    steps, loss = [], GateTraining.loss
    monkeypatch.setattr(GateTraining, "loss", lambda *args: steps.append(1 / (args[2] != 3)) or loss(*args))
    with pytest.raises(ZeroDivisionError):
        run("stopped")
    monkeypatch.setattr(GateTraining, "loss", lambda *args: steps.append(args[2]) or loss(*args))
    assert run("stopped") == whole
    assert steps[3:] == [2, 3, 4, 5]


def test_ranks_share_the_rows_of_gates(world):
    training = gate_training(world)
    with gated(training.pair, [torch.tensor([0.2, 0.4, 0.1, 0.3])]) as student, torch.no_grad():
        whole = training.loss(student, 3, Ranks())
        parts = [training.loss(student, 3, Ranks(rank=rank, size=2)) for rank in range(2)]
    assert abs(parts[0] - parts[1]) > 1e-3
    torch.testing.assert_close(sum(parts) / 2, whole)
    with pytest.raises(HyLoError, match="--train-batch 4: expected a multiple of the 3 ranks"):
        training(GateState.begin(world / "unused", 4, 0.1), Ranks(size=3))


def test_gates_at_their_ends_are_the_two_models(world):
    pair, ids = load_pair(world / "hf", world / "linear-hf", CPU, torch.float32), tiny.tokens(2, 48)
    linear = pair.student(ids).logits
    for value, logits in ((0.0, linear), (1.0, pair.teacher(ids).logits)):
        with gated(pair, [torch.full((4,), value)]) as student:
            torch.testing.assert_close(student(ids).logits, logits, rtol=1e-4, atol=1e-4)
    assert torch.equal(pair.student(ids).logits, linear)


def test_flags_that_a_method_does_not_read_are_refused(world, tmp_path, capsys):
    def error(method, *more):
        return refused(capsys, world, tmp_path, *more, method=method)

    assert "--method smart trains nothing: leave out --steps" in error("smart", "--steps", 5)
    assert "--method gates ranks all layers in one training" in error("gates", "--greedy")
    assert "--train-tokens 64: expected at least --train-batch 8 rows" in error("kl", "--train-tokens", 64)
    assert "the budget allows all 4 layers" in error("smart", "--mla", 4)
    samples = ("--retrieval", world / "samples", "--retrieval-samples", 4, "--train-tokens", 256)
    assert "4 samples are measured and 2 left to train on, expected --train-batch 8" in error("gates", *samples)
    assert "lower --train-tokens" in error("kl", "--train-tokens", 4096)
    assert "--retrieval-samples 9: needs --retrieval" in error("smart", "--retrieval-samples", 9)


@pytest.mark.parametrize("method, says, flags", [
    ("uniform", "measures", "--steps 5, --lr 1, --retrieval-weight 0.3, --tokens 50, --greedy, --device cpu"),
    ("explicit", "measures", "--steps 4, --length 64, --train-batch 3"),
    ("smart", "trains", "--steps 4, --lr 1, --train-batch 3, --train-tokens 7"),
])  # fmt: skip
def test_flags_of_other_methods_are_refused(method, says, flags):
    budget = ("--layers", "1,2") if method == "explicit" else ("--mla", "1")
    for each in flags.split(", "):
        message = f"--method {method} {says} nothing: leave out {each.split()[0]}"
        with pytest.raises(HyLoError, match=message):
            command.parse(["--method", method, "--teacher", "base", "--out", "out", *budget, *each.split()])


# ---- cache ----


def test_an_interrupted_selection_goes_on(tmp_path):
    stopped = Table(lambda layers: 1 / 0 if layers == {2} else len(layers))
    with pytest.raises(ZeroDivisionError):
        one_by_one(stopped.bench(tmp_path), Score(base=Measured(kl=10)), 4)
    table = Table(len)
    found = one_by_one(table.bench(tmp_path), Score(base=Measured(kl=10)), 4)
    assert table.asked == ["2", "3"]
    assert found.scores == dict.fromkeys(range(4), pytest.approx(0.1))
    assert [layers_of(name_of(frozenset(layers))) for layers in ((), (4, 14))] == [NONE, {4, 14}]


def test_a_cache_of_other_settings_is_refused(world, tmp_path, capsys, monkeypatch):
    select(world, tmp_path)
    measured = sorted((tmp_path / "measured").iterdir())
    assert [path.stem for path in measured] == ["0", "1", "2", "3", "none"]
    monkeypatch.setattr(Judge, "__call__", None)
    select(world, tmp_path, "--mla", 2)  # a budget is no setting of measurements: nothing is measured again
    assert "settings.json: rows is " in refused(capsys, world, tmp_path, "--tokens", 128)
    assert "settings.json: teacher is " in refused(capsys, world, tmp_path, "--teacher", world / "other")
    assert "settings.json: dtype is 'float32'" in refused(capsys, world, tmp_path, "--dtype", "bfloat16")
    measured[0].write_text('{"kl": "low"}')
    assert "0.json: field kl" in refused(capsys, world, tmp_path)


def test_two_ranks_equal_one(world, tmp_path):
    more = ("--retrieval", world / "samples", "--retrieval-samples", 4, "--greedy")
    one = select(world, tmp_path / "one", *more, budget=("--mla", 2))
    program = ("-m", "hylo_megatron.select.command")
    done = torchrun(*program, *flags(world, tmp_path / "two", *more, budget=("--mla", 2)))
    assert done.returncode == 0, done.stderr[-2000:]
    two = json.loads((tmp_path / "two" / "plan.json").read_text())
    assert two == one
    names = [sorted(path.name for path in (tmp_path / run / "measured").iterdir()) for run in ("one", "two")]
    assert names[0] == names[1] and len(names[0]) == 1 + 4 + 3


# ---- budgets and plans ----


def test_budgets_in_layers_share_and_bytes_agree(world, tmp_path):
    """A key-value head pair of the base is 2 x 2 x 16 values a layer, so 512 bytes for 4 layers in bf16."""

    def chosen(*budget):
        plan = select(world, tmp_path, method="uniform", budget=budget)
        return len(plan["mla_layers"]), plan["cache_bytes"], plan["cache_share"]

    count, row, share = chosen("--mla", 1)
    assert count == 1 and share == row / 512
    assert chosen("--cache-bytes", 2 * row)[0] == 2 and chosen("--cache-bytes", 2 * row - 1)[0] == 1
    assert chosen("--cache-share", 2 * share)[0] == 2
    assert chosen("--cache-bytes", 100 * row)[0] == 4


def test_budgets_that_do_not_fit_are_refused(world, tmp_path, capsys):
    def error(*budget, method="uniform", more=()):
        return refused(capsys, world, tmp_path, *more, method=method, budget=budget)

    assert "--cache-bytes 1: no MLA layer fits; expected at least" in error("--cache-bytes", 1)
    assert "--mla 5: the base model has 4 layers" in error("--mla", 5)
    assert "--method uniform: give --mla" in error()
    assert "not allowed with argument" in error("--mla", 1, "--cache-bytes", 9)
    assert "--method explicit: give --layers and no budget" in error("--mla", 1, method="explicit")
    assert "measures nothing: leave out --student" in error("--mla", 1, more=("--student", world / "student"))
    assert "--retrieval-weight 0.5: needs --retrieval" in error(
        "--mla", 1, method="smart", more=("--retrieval-weight", 0.5)
    )


def test_models_that_do_not_belong_together_are_refused(world, tmp_path, capsys):
    hybrid = tmp_path / "hybrid"
    upcycle(world / "base", hybrid, ("gdn", "mla", "gdn", "gdn"), init="svd", log=list)
    out = tmp_path / "out"
    assert "expected a student whose layers are all linear" in refused(capsys, world, out, "--student", hybrid)
    assert "is a hybrid" in refused(capsys, world, out, "--teacher", world / "student")
    wide = tiny.save_model(tiny.teacher_model("llama", vocab_size=tiny.VOCAB + 4), tmp_path / "wide")
    assert "vocab_size is 300, the teacher's is 304" in refused(capsys, world, out, "--teacher", wide)
    linear = refused(capsys, world, out, "--linear", "kda")
    assert "--linear kda: --student " in linear and "is 4GDN, and its layers are measured; leave" in linear
    assert "has 6 samples, expected 7" in refused(
        capsys, world, out, "--retrieval", world / "samples", "--retrieval-samples", 7
    )


def test_upcycle_and_planner_compare_the_geometry(world, tmp_path, capsys, monkeypatch):
    select(world, tmp_path, "--geometry", "native:16+8", method="uniform")
    layers = str(tmp_path / "plan.json")
    monkeypatch.setattr("sys.argv", ["hylo plan", str(world / "hf"), "--plan", layers])
    for program in (lambda: upcycle_command(["--teacher", str(world / "base"), "--out", str(tmp_path / "student"),
                                             "--mla-layers", layers, "--init", "svd"]), plan_command):  # fmt: skip
        with pytest.raises(SystemExit):
            program()
        assert "geometry is native:16+8, with which the cache was counted, but the layers get native" in (
            capsys.readouterr().err
        )


@pytest.mark.parametrize("counted, mla, linear, wrong", [
    ("native", "native", "native", None),
    ("native:16+8", "native", "native", "mla"),
    ("native:16+8", "native:16+8", "native", None),  # the linear layers are the same ones
    ("native", "native", tiny.GEOMETRY, "linear"),
    ("published", "native", "native", "mla"),  # no dimensions for this base model
])  # fmt: skip
def test_assemble_compares_the_geometry(world, tmp_path, capsys, counted, mla, linear, wrong):
    select(world, tmp_path, method="uniform")
    layers, base = str(tmp_path / "plan.json"), Architecture.load(world / "base")
    tiny.edit_json(Path(layers), geometry=counted)
    for name, kind, geometry in (("mla", "mla", mla), ("linear", "gdn", linear)):
        (tmp_path / name).mkdir()
        student_architecture(base, (kind,) * 4, geometry).save(tmp_path / name)
    if wrong is None:
        assert assemble.plan_for(layers, None, tmp_path / "mla", tmp_path / "linear").name == "1MLA3GDN"
        return
    with pytest.raises(SystemExit):
        assemble.main(["--mla", str(tmp_path / "mla"), "--linear-student", str(tmp_path / "linear"),
                       "--mla-layers", layers, "--out", str(tmp_path / "out")])  # fmt: skip
    refusal = f"geometry is {counted}, with which the cache was counted, but the layers get another one in {tmp_path}/"
    assert refusal + wrong + ";" in capsys.readouterr().err


def test_checkpoints_are_taken_and_the_plan_is_one_for_upcycle(world, tmp_path):
    plan = select(world, tmp_path, "--teacher", world / "base", "--student", world / "linear", budget=("--mla", 2))
    assert not (tmp_path / "exported").exists()
    assert Plan.parse(4, str(tmp_path / "plan.json")) == tuple(
        "mla" if layer in plan["mla_layers"] else "gdn" for layer in range(4)
    )
    explicit = select(world, tmp_path / "explicit", "--layers", "0,3", "--linear", "kda", method="explicit", budget=())
    assert explicit["mla_layers"] == [0, 3] and explicit["plan"] == "2MLA2KDA"
    file = tmp_path / "explicit" / "plan.json"
    assert Plan.parse(4, str(file)) == ("mla", "kda", "kda", "mla")
    recipe = replace(smollm2_cpu(), layers=4, plan=str(file))
    assert (recipe.plan, recipe.linear) == ("0,3", "kda")  # a run that goes on does not read the file again
    for geometry in ("published", geometry_preset("native", 64, 4, 16)):
        with pytest.raises(HyLoError, match="geometry is native, .* the layers get (published|dimensions of)"):
            replace(smollm2_cpu(), layers=4, plan=str(file), geometry=geometry)
    for arguments, message in (
        ((4, str(file), None, "published"), "geometry is native, .* the layers get published; give them native"),
        ((5, str(file)), "num_layers is 4, the base model has 5"),
        ((4, str(file), "gdn"), "linear is kda, --linear gdn"),
        ((4, str(tmp_path / "absent.json")), "not found; expected plan.json of hylo select-layers"),
    ):
        with pytest.raises(HyLoError, match=message):
            Plan.parse(*arguments)
