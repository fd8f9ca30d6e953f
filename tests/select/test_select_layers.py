"""``hylo select-layers``: the one layer that matters is found, and budgets, models and plans fit together."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.selection import CPU, MATTERS, refused, select

from hylo_megatron.config import Architecture, Plan, geometry_preset
from hylo_megatron.config.student import student_architecture
from hylo_megatron.convert import assemble, megatron_to_hf
from hylo_megatron.errors import HyLoError
from hylo_megatron.init.upcycle import main as upcycle_command
from hylo_megatron.init.upcycle import upcycle
from hylo_megatron.planner.command import main as plan_command
from hylo_megatron.recipes.smollm2 import smollm2_cpu
from hylo_megatron.select import judge
from hylo_megatron.select.judge import Judge
from hylo_megatron.select.models import load_pair, load_windowed
from hylo_megatron.select.rows import Rows

# ---- the layer that matters ----


@pytest.mark.parametrize("method", ["smart", "window"])
@pytest.mark.parametrize("teacher", MATTERS)
def test_the_layer_that_matters_is_found(world, tmp_path, capsys, teacher, method):
    """Two teachers that differ in this layer alone: no score that is blind to the models finds both."""
    plan = select(world, tmp_path, "--teacher", world / teacher, method=method)
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


def test_windows_hide_far_tokens_in_all_layers_but_the_restored_ones(world):
    """transformers takes a mask of rows and columns, which hides the same tokens."""
    windowed = load_windowed(world / "hf", {"size": 5, "sinks": 2}, CPU, torch.float32)
    model, ids = windowed.teacher, tiny.tokens(2, 48)
    before = model(ids).logits
    mask = torch.ones(48, 48, dtype=torch.bool).tril()
    mask &= ~torch.ones(48, 48, dtype=torch.bool).tril(-5) | (torch.arange(48) < 2)
    expected = model(ids, attention_mask=mask[None, None].expand(2, 1, 48, 48)).logits
    with windowed.restored([]) as student:
        torch.testing.assert_close(student(ids).logits, expected, rtol=1e-4, atol=1e-4)
    assert (expected - before).abs().max() > 0.1
    with windowed.restored(range(4)) as student:
        assert torch.equal(student(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


@pytest.mark.parametrize("family", ["mistral", "qwen2"])
def test_a_base_model_may_have_a_sliding_window_as_long_as_the_rows(tmp_path, family):
    """transformers then gives the layers a mask, although the window hides nothing."""
    window = {"qwen2": {"use_sliding_window": True, "max_window_layers": 1}}.get(family, {})
    model = tiny.teacher_model(family, sliding_window=48, max_position_embeddings=48, **window)
    tiny.save_model(model, tmp_path / "hf")
    windowed, ids = load_windowed(tmp_path / "hf", {"size": 5, "sinks": 2}, CPU, torch.float32), tiny.tokens(2, 48)
    with windowed.restored([1]) as student:
        got = student(ids).logits
    short = ids[:, :47]  # without a mask of transformers
    with windowed.restored([1]) as student:
        torch.testing.assert_close(got[:, :47], student(short).logits, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("method", ["uniform", "window"])
def test_a_hybrid_is_no_base_model(world, tmp_path, capsys, method):
    error = refused(capsys, world, tmp_path, "--teacher", world / "linear-hf", method=method)
    assert f"--teacher {world / 'linear-hf'}: is a hybrid (4GDN), expected the model it came from" in error


def test_flags_that_do_not_belong_to_windows_are_refused(world, tmp_path, capsys):
    def error(*more, method="window"):
        return refused(capsys, world, tmp_path, *more, method=method)

    assert "measures the base model alone: leave out --student" in error("--student", world / "student")
    assert "--method smart: leave out --window" in error("--window", "4", method="smart")
    assert "--length 32: a window of 36 tokens sees whole rows" in error("--window", "32+4")
    for window in ("off", "4+1:all"):
        assert "needs SIZE[+SINKS], such as 256+4, without :all" in error("--window", window)


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


def test_measurements_that_are_no_numbers_are_refused(world, monkeypatch):
    pair = load_pair(world / "hf", world / "linear-hf", CPU, torch.float32)
    judged = Judge(pair.teacher, Rows(text_BS=tiny.tokens(2, 16)))
    assert judged(pair.student).answer_loss is None
    monkeypatch.setattr(Judge, "_answer_loss", lambda *_: float("nan"))
    with pytest.raises(HyLoError, match="loss of answers is not finite"):
        judged(pair.student)


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
    assert "--layers '9': numbers must differ and lie in 0..3" in error("--layers", 9, method="explicit")
    contradicting = error("--layers", "1MLA3KDA", method="explicit", more=("--linear", "gdn"))
    assert "--layers '1MLA3KDA' and --linear gdn contradict each other" in contradicting
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


@pytest.mark.parametrize("mla, linear, fits", [
    (None, tiny.WINDOW, True), (tiny.WINDOWS, tiny.WINDOW, True), (tiny.WINDOWS, None, False),
    (tiny.WINDOWS, {"size": 9, "sinks": 2}, False),
])  # fmt: skip
def test_assemble_compares_the_windows(tmp_path, mla, linear, fits):
    weights = {}
    for kind, window in (("mla", mla), ("gdn", linear)):
        weights[kind] = tiny.write_hybrid(tmp_path / kind, tiny.hybrid(plan=(kind,) * 4, window=window))
    arguments = tmp_path / "mla", tmp_path / "gdn", Plan.parse(4, "0", "gdn"), tmp_path / "out"
    if not fits:
        with pytest.raises(HyLoError, match="mla has window .* expected one size, or none in"):
            assemble.assemble(*arguments)
        return
    assert assemble.assemble(*arguments).window == (mla or linear)
    megatron_to_hf.convert(tmp_path / "out", tmp_path / "hf")
    layer = {"mla": "model.layers.0.", "gdn": "model.layers.1."}
    want = {key: t for kind, found in weights.items() for key, t in found.items() if key.startswith(layer[kind])}
    got = {key: t for key, t in tiny.weights(tmp_path / "hf").items() if key.startswith(tuple(layer.values()))}
    shared = {key for key in want if ".mlp." in key or "layernorm" in key}  # those of the MLA student
    tiny.same_bits(*({key: t for key, t in part.items() if key not in shared} for part in (got, want)))


def test_checkpoints_are_taken_and_the_plan_is_one_for_upcycle(world, tmp_path):
    plan = select(world, tmp_path, "--teacher", world / "base", "--student", world / "linear", budget=("--mla", 2))
    assert not (tmp_path / "exported").exists()
    assert Plan.parse(4, str(tmp_path / "plan.json")) == tuple(
        "mla" if layer in plan["mla_layers"] else "gdn" for layer in range(4)
    )
    explicit = select(world, tmp_path / "explicit", "--layers", "0,3", "--linear", "kda", method="explicit", budget=())
    assert explicit["mla_layers"] == [0, 3] and explicit["plan"] == "2MLA2KDA"
    named = select(world, tmp_path / "named", "--layers", "1MLA3KDA", method="explicit", budget=())
    assert named["plan"] == "1MLA3KDA" and named["linear"] == "kda"
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
        ((4, str(file), "gdn"), "linear is kda, but --linear gdn was given"),
        ((4, str(tmp_path / "absent.json")), "not found; expected plan.json of hylo select-layers"),
    ):
        with pytest.raises(HyLoError, match=message):
            Plan.parse(*arguments)
