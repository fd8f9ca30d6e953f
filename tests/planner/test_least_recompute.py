"""How many sub-layers a stage recomputes: as few as a card has memory for. Also what ``hylo plan --recipe`` says."""

import re
import sys
from dataclasses import replace

import pytest

from hylo_megatron.config.layout import ParallelLayout
from hylo_megatron.planner import command
from hylo_megatron.planner.layouts import CHOSEN, GIB, USABLE, Training, layouts, least_recompute, peak_bytes
from hylo_megatron.planner.speed import CARDS
from hylo_megatron.planner.training import PlannedRun
from hylo_megatron.recipes.shapes import recipe_named, shape, student_shape

CARD = 80 * GIB


def training(recipe: str = "llama1b", teacher: str = "llama8b", shared: bool = False) -> Training:
    declared, base = recipe_named(recipe), shape(recipe)
    return Training(recipe=declared, student=student_shape(declared, base), base=base, teacher=shape(teacher),
                    shared=shared)  # fmt: skip


def longest(recipe: str = "llama1b", **sizes: int) -> PlannedRun:
    """Return the stage at 64K as the recipe declares it, on one copy of the model."""
    found, layout = training(recipe), ParallelLayout(**sizes)
    stage = found.recipe.stages[-1]
    return found.run(stage, layout, layout.ranks, stage.recompute)


def test_the_peaks_that_the_choice_rests_on():
    for cp, recompute, gib in ((4, 32, 33.1), (4, 0, 59.0), (2, 32, 41.0), (2, 16, 64.8)):
        run = replace(longest(cp=cp), recompute=recompute)
        assert peak_bytes(run) / GIB == pytest.approx(gib, abs=0.06)


@pytest.mark.parametrize("sizes, chosen", [({"cp": 4}, 0), ({"cp": 2}, 16), ({}, 28)])
def test_a_stage_at_64k_recomputes_as_few_as_fit(sizes, chosen):
    run = longest(**sizes)
    assert least_recompute(run, CARD) == chosen
    assert peak_bytes(replace(run, recompute=chosen)) <= CHOSEN * CARD
    assert not chosen or peak_bytes(replace(run, recompute=chosen - 2)) > CHOSEN * CARD


@pytest.mark.parametrize("recipe, sizes", [("llama1b", {}), ("llama1b", {"pp": 4}), ("llama3b", {"cp": 4, "pp": 2})])
def test_a_larger_card_recomputes_fewer_whole_layers(recipe, sizes):
    run = longest(recipe, **sizes)
    found = [least_recompute(run, gib * GIB) for gib in range(24, 340, 4)]
    assert found == sorted(found, reverse=True) and found[0] == run.sub_layers and found[-1] == 0
    assert len(set(found)) > 3 and all(number % 2 == 0 for number in found)


def test_a_rank_of_a_pipeline_counts_its_own_sub_layers():
    run = longest(pp=4)
    assert (run.recompute, run.sub_layers, least_recompute(run, GIB), least_recompute(run, CARD)) == (32, 8, 8, 6)


def test_never_more_than_declared():
    fewer = replace(longest(), recompute=5)
    assert peak_bytes(replace(fewer, recompute=28)) < CHOSEN * CARD < peak_bytes(fewer)
    assert least_recompute(fewer, CARD) == 5  # it does not fit: nobody declared more
    assert [least_recompute(fewer, gib * GIB) for gib in (165, 170, 180)] == [4, 2, 0]
    assert least_recompute(replace(longest(), recompute=0), GIB) == 0


def test_a_stage_above_the_budget_is_planned_as_before():
    """At most 0.9 of the memory with the declared number, or else with all sub-layers."""
    found = training()
    less = replace(found, recipe=replace(found.recipe, stages=(replace(found.recipe.stages[-1], recompute=30),)))
    [alone] = layouts(less, 1, 66, CARDS["H100"])
    assert CHOSEN * 66 * GIB < alone.memory <= USABLE * 66 * GIB and alone.stages[0].recompute == 30
    [all_of_it] = layouts(less, 1, 63, CARDS["H100"])
    assert all_of_it.stages[0].recompute == 32 and all_of_it.stages[0].exceeds_declared
    assert layouts(less, 1, 61, CARDS["H100"]) == []


def test_a_recipe_that_shares_its_gpus_recomputes_what_it_declares():
    for shared, recomputed in ((True, 29), (False, 0)):
        [alone] = layouts(training("smollm2", "smollm2", shared), 1, 80, CARDS["H100"])
        assert [plan.recompute for plan in alone.stages] == [0, 0, 0, recomputed]


def planned(monkeypatch, capsys, flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["hylo plan", *flags.split()])
    command.main()
    return capsys.readouterr().out


def test_the_list_of_layouts_shows_what_is_recomputed(monkeypatch, capsys):
    flags = "--recipe llama1b --gpus 4 --teacher-shape llama8b --gpu-memory"
    printed = planned(monkeypatch, capsys, f"{flags} 80")
    rows = re.findall(r"^\| (\d) +\| +(\d) \| +(\d) \|.* (\d+ of \d+) \|$", printed, re.M)
    shown = {tuple(map(int, sizes)): cell for *sizes, cell in rows}
    assert printed.count("| recomputed |") == 1 and len(shown) == 8
    assert (shown[1, 1, 4], shown[1, 1, 2], shown[1, 2, 1]) == ("0 of 32", "12 of 32", "10 of 16")
    assert "as few of a rank's sub-layers as keep its plan within 85% of the memory" in printed
    tight = planned(monkeypatch, capsys, f"{flags} 62.5 --gpus 1")
    assert "32 of 32* |" in tight and "* with recompute=32 in the stage, which fits only so." in tight


def test_the_list_says_where_evaluations_share_the_gpu(monkeypatch, capsys):
    printed = planned(monkeypatch, capsys, "--recipe smollm2-window")
    assert "29 of 60 |" in printed and "the sub-layers that it declares: evaluations run beside" in printed
