"""The methods that train, kl and gates, find the layer that matters."""

import pytest
import torch
from helpers import tiny
from helpers.selection import CPU, LENGTH, MATTERS, refused, select

from hylo_megatron.errors import HyLoError
from hylo_megatron.select import command, gates
from hylo_megatron.select.distilled import measure_distilled
from hylo_megatron.select.gates import GateState, GateTraining, gated, gates_of
from hylo_megatron.select.judge import Judge, Measured
from hylo_megatron.select.models import load_pair
from hylo_megatron.select.ranking import Score
from hylo_megatron.select.ranks import Ranks
from hylo_megatron.select.rows import Rows
from hylo_megatron.select.training import Training


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
