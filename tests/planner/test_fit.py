"""Rates of the planner are found again in steps that were planned with other rates."""

from dataclasses import replace

import pytest

from hylo_megatron.config.layout import ParallelLayout
from hylo_megatron.planner.fit import MeasuredStep, fitted_to
from hylo_megatron.planner.layouts import Training
from hylo_megatron.planner.speed import CARDS, FITTED, step_time
from hylo_megatron.recipes.shapes import recipe_named, shape, stage_named, student_shape

CARD = CARDS["H100"]


def steps(constants, *layouts: dict) -> list[MeasuredStep]:
    """Return steps of the 64K stage that take what ``constants`` say."""
    recipe, base = recipe_named("llama1b"), shape("llama1b")
    training = Training(recipe=recipe, student=student_shape(recipe, base), base=base, teacher=shape("llama8b"))
    stage, found = stage_named(recipe, "distill-64k"), []
    for sizes in layouts:
        layout = ParallelLayout(**{name: size for name, size in sizes.items() if name != "dp"})
        gpus = layout.ranks * sizes.get("dp", 1)
        run = training.run(replace(stage, global_batch=gpus // layout.cp), layout, gpus, stage.recompute)
        found.append(MeasuredStep(run=run, seconds=step_time(run, CARD, constants).total, card=CARD))
    return found


def test_rates_are_found_again():
    truth = replace(FITTED, products=0.8, nvlink=2e11)
    found = fitted_to(steps(truth, {}, {"dp": 2}, {"cp": 2}, {"tp": 2}, {"cp": 2, "dp": 2}))
    for name in ("products", "nvlink"):
        assert getattr(found, name) == pytest.approx(getattr(truth, name), rel=1e-3), name
    assert replace(found, products=FITTED.products, nvlink=FITTED.nvlink) == FITTED


def test_other_constants_are_found_if_asked_for():
    """Also seconds, which are slower where they are larger."""
    truth = replace(FITTED, recurrence=1.5 * FITTED.recurrence, attention=0.7)
    found = fitted_to(steps(truth, {}, {"cp": 2}, {"tp": 2}), names=("recurrence", "attention"))
    assert found.recurrence == pytest.approx(truth.recurrence, rel=1e-3)
    assert found == replace(FITTED, recurrence=found.recurrence, attention=pytest.approx(0.7, rel=1e-3))


def test_each_step_is_planned_with_the_rate_of_its_card():
    slow = [replace(step, seconds=step_time(step.run, CARD / 2, FITTED).total, card=CARD / 2)
            for step in steps(FITTED, {}, {"dp": 2})]  # fmt: skip
    assert fitted_to([*slow, *steps(FITTED, {})]).products == pytest.approx(FITTED.products, rel=1e-3)


def test_what_no_step_depends_on_stays():
    alone = fitted_to(steps(replace(FITTED, products=0.8, nvlink=1e9), {}))
    assert alone.nvlink == FITTED.nvlink
    assert alone.products == pytest.approx(0.8, rel=1e-3)


def test_the_first_rate_changes_where_several_explain_the_steps():
    shared = fitted_to(steps(replace(FITTED, products=0.8), {"cp": 2}))
    assert shared.products == pytest.approx(0.8, rel=1e-3)
    assert shared.nvlink == pytest.approx(FITTED.nvlink, rel=1e-3)


def test_a_fit_lowers_the_error_and_stays_in_limits():
    odd = [replace(step, seconds=step.seconds * factor) for step, factor in zip(
        steps(FITTED, {}, {"cp": 2}, {"dp": 2}), (1.0, 100.0, 1.1), strict=True)]  # fmt: skip
    found = fitted_to(odd)
    assert found.nvlink == pytest.approx(FITTED.nvlink / 10)

    def worst(constants):
        return sum((1 - 1 / (1 + step.error(constants))) ** 2 for step in odd)

    assert worst(found) < worst(FITTED)
