"""Scores of layers, their order, and measurements that a folder keeps."""

import json

import pytest
from helpers.selection import MATTERS, flags, refused, select
from helpers.train import torchrun

from hylo_megatron.errors import HyLoError
from hylo_megatron.select.cache import Cache, layers_of, name_of
from hylo_megatron.select.judge import Judge, Measured
from hylo_megatron.select.ranking import NONE, Bench, Score, greedy, one_by_one
from hylo_megatron.select.ranks import Ranks


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
    with pytest.raises(HyLoError, match="the student equals its teacher"):
        Score(base=Measured(kl=0.0))


def test_answers_have_a_weight_in_the_score(world, tmp_path):
    """The weight reaches the score, and scores of all weights come from the same measurements."""
    samples = ("--retrieval", world / "samples", "--retrieval-samples", 4, "--retrieval-weight")
    alone, mixed, none = (select(world, tmp_path, *samples, weight)["scores"] for weight in (1, 0.25, 0))
    assert alone.pop(str(MATTERS["teacher"])) == pytest.approx(1, abs=1e-4)
    assert max(alone.values()) < 1e-4
    for layer, score in alone.items():
        assert mixed[layer] == pytest.approx(0.25 * score + 0.75 * none[layer])


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
