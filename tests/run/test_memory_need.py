"""A recipe's run recomputes as few sub-layers as its GPUs have memory for, and its record does not say how many."""

import argparse
from dataclasses import replace
from types import SimpleNamespace

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny
from helpers import train as helpers
from helpers.recipes import toy_recipe

from hylo_megatron.config.layout import ParallelLayout
from hylo_megatron.distill.memory_check import UNPLANNED
from hylo_megatron.errors import HyLoError
from hylo_megatron.recipes.shapes import recipe_named, shape, student_shape
from hylo_megatron.run import memory_need
from hylo_megatron.run.launch import Processes
from hylo_megatron.run.recipe_run import Run
from hylo_megatron.run.source import Source

GIB = 2**30
LAST = "distill-64k"


@pytest.fixture
def cards(monkeypatch) -> list[int | None]:
    """Bytes of each GPU of this machine. A test may change them."""
    found = [int(79.1 * GIB)] * 8
    monkeypatch.setattr(memory_need, "gpu_bytes", lambda index: found[index] if index < len(found) else None)
    return found


def recipe_run(tmp_path, flags: tuple = (), beside: bool = False, dp: int = 1, **sizes: int) -> Run:
    """Return the run of llama1b, which starts its trainings nowhere: ``run.begun`` has their command lines."""
    begun = []

    def start(arguments, processes, log):
        begun.append(arguments)
        return SimpleNamespace()

    run = Run(recipe_named("llama1b"), tmp_path, Processes(layout=ParallelLayout(**sizes), dp=dp, cuda_graph=False),
              Source(tmp_path / "base", (tmp_path / "tokens",)), start, flags, beside)  # fmt: skip
    run.begun = begun
    return run


def settle(run: Run) -> dict[str, int]:
    base = shape("llama1b")
    return memory_need.settle(run, student_shape(run.recipe, base), base, shape("llama8b"))


def test_a_stage_trains_with_as_few_as_fit_and_says_so(tmp_path, cards, capsys):
    run = recipe_run(tmp_path, cp=2)
    run.recomputed = settle(run)
    line = "distill-64k: 16 of 32 sub-layers recomputed (64.8 GiB of 79.1 by the planner's count)\n"
    assert run.recomputed == {LAST: 16} and capsys.readouterr().out == line
    for index, recomputed in enumerate((None, None, None, "16")):
        words = run._start(index) and run.begun[index]
        found = words[words.index("--recompute-num-layers") + 1] if "--recompute-num-layers" in words else None
        assert found == recomputed
    assert settle(recipe_run(tmp_path, cp=2, pp=2)) == {LAST: 2}
    assert "2 of 16 sub-layers of a pipeline rank recomputed" in capsys.readouterr().out


def test_a_stage_that_recomputes_nothing_has_no_flags_for_it(tmp_path, cards):
    run = recipe_run(tmp_path, cp=4)
    run.recomputed = settle(run)
    assert run.recomputed == {LAST: 0}
    run._start(3)
    assert not [word for word in run.begun[0] if word.startswith("--recompute")]


def test_the_smallest_card_decides(tmp_path, cards):
    assert settle(recipe_run(tmp_path, cp=4)) == {LAST: 0}
    cards[3] = 44 * GIB
    assert settle(recipe_run(tmp_path, cp=4)) == {LAST: 28}
    assert settle(recipe_run(tmp_path, cp=2)) == {LAST: 16}  # the small card has no rank
    cards[1:] = []  # ranks of other machines: their cards are taken to be the same
    assert settle(recipe_run(tmp_path, cp=4)) == {LAST: 0}


def test_without_a_gpu_nothing_is_chosen(tmp_path, cards, capsys):
    cards.clear()
    assert settle(recipe_run(tmp_path, cp=4)) == {} and not capsys.readouterr().out


@pytest.mark.parametrize("word", [
    "--recompute-num-layers=8", "--recompute-granularity=selective", "--no-memory-check",
    "--num-layers-per-virtual-pipeline-stage=2", *UNPLANNED,
])  # fmt: skip
def test_flags_of_the_user_keep_the_declared_number(tmp_path, cards, capsys, word):
    assert settle(recipe_run(tmp_path, (word,), cp=4)) == {} and not capsys.readouterr().out


def test_flags_that_the_planner_counts_are_counted(tmp_path, cards):
    alone, moved = (settle(recipe_run(tmp_path, flags))[LAST] for flags in ((), ("--hylo-offload-optimizer",)))
    assert moved < alone == 28


def test_evaluations_on_the_same_gpu_and_controls_keep_the_declared_number(tmp_path, cards):
    assert settle(recipe_run(tmp_path, beside=True, cp=4)) == {}
    control = recipe_run(tmp_path, cp=4)
    assert memory_need.settle(control, shape("llama1b"), shape("llama1b"), shape("llama8b")) == {}


def test_a_stage_that_is_above_the_budget_keeps_the_declared_number_or_is_refused(tmp_path, cards):
    cards[0] = 58 * GIB
    assert settle(recipe_run(tmp_path)) == {LAST: 32}
    cards[0] = 40 * GIB
    with pytest.raises(HyLoError, match=r"^distill-\w+: memory: the fullest rank needs .* recompute sub-layers"):
        settle(recipe_run(tmp_path))


def test_another_choice_continues_the_same_run(tmp_path, cards):
    first = recipe_run(tmp_path, cp=4)
    first.recomputed = settle(first)
    first._claim()
    record = (tmp_path / "recipe.json").read_text()
    second = recipe_run(tmp_path)
    second.recomputed = settle(second)
    second._claim()
    assert first.recomputed != second.recomputed and (tmp_path / "recipe.json").read_text() == record


@pytest.mark.slow
def test_a_killed_stage_goes_on_with_another_number(tmp_path, monkeypatch, cards):
    """On a GPU with room for everything, killed, and then on a CPU, where the declared sub-layers are recomputed."""
    world = helpers.make_world(tmp_path / "world")
    model = tiny.save_model(tiny.teacher_model("llama"), tmp_path / "hf")
    stage = replace(toy_recipe().stages[1], mix=(), on_policy=0.0, seq_length=64, steps=6, recompute=8)
    recipe, recomputed, seen = replace(toy_recipe(), stages=(stage,)), [], {}

    def start(arguments, processes, log):
        parser = argparse.ArgumentParser(allow_abbrev=False)
        parser.add_argument("--recompute-num-layers", type=int, default=0)
        recomputed.append(parser.parse_known_args(arguments)[0].recompute_num_layers)
        variables = {} if recomputed[1:] or whole else {"HYLO_TEST_KILL_AT": "4"}
        return helpers.Forked(arguments, log, **variables)

    def execute(name):
        out = tmp_path / name
        Run(recipe, out, Processes(), Source(model, (world["data"],)), start).execute()
        lines = helpers.read_log(out / stage.name / "train_log.jsonl")
        seen[name] = [(line["iteration"], line["loss"], line["grad_norm"]) for line in lines]

    whole = False
    with pytest.raises(HyLoError, match="killed by SIGKILL"):
        execute("killed")
    cards.clear()
    execute("killed")
    whole = True
    execute("whole")
    assert recomputed == [0, 8, 8]
    assert [line[0] for line in seen["killed"]] == list(range(1, 7))
    assert seen["killed"] == [pytest.approx(line, rel=1e-6) for line in seen["whole"]]
