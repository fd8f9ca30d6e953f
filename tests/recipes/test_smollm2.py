"""What the flags of the SmolLM2 recipe change."""

import argparse

import pytest

from hylo_megatron.errors import HyLoError
from hylo_megatron.recipes.shapes import SHAPES, student_shape
from hylo_megatron.recipes.smollm2 import found_recipe


def recipe(**given):
    options = dict(recipe="window", plan=None, linear=None, geometry=None, seed=1234, tokens=None, text=None,
                   batch_factor=1, sampled_share=0.0, on_policy_share=0.0)  # fmt: skip
    return found_recipe(argparse.Namespace(**options | given))


@pytest.mark.parametrize("given, share", [
    ({}, 6 * 160), (dict(plan="17,18,20", geometry="native"), 3 * 320),
    (dict(plan="18,20", geometry="native"), 2 * 320),
    (dict(recipe="base"), 3 * 320), (dict(recipe="base", geometry="native:128+32"), 3 * 160),
])  # fmt: skip
def test_plan_and_geometry_decide_the_cache(given, share):
    student = student_shape(recipe(**given), SHAPES["smollm2"])
    assert student.kv_bytes_per_token() == 2 * share  # of the base model's 23,040 bytes


def test_a_wrong_geometry_is_refused():
    with pytest.raises(HyLoError, match="^--geometry 'wide': expected one of native, published"):
        recipe(geometry="wide")
