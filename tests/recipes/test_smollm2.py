"""What the flags of the SmolLM2 recipe change."""

import argparse
import json
import re

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


@pytest.mark.parametrize("kind, counted, given, wrong", [
    ("window", "native", "native", None), ("window", "native:128+32", None, "native"),
    ("base", "native:128+32", "native:128+32", None), ("base", "native", None, "native:128+32"),
])  # fmt: skip
def test_a_plans_file_is_read_for_the_geometry_that_the_layers_get(tmp_path, kind, counted, given, wrong):
    file = tmp_path / "plan.json"
    file.write_text(json.dumps(dict(num_layers=30, mla_layers=[18, 20], linear="kda", geometry=counted)))
    found = recipe(recipe=kind, plan=str(file), geometry=given)
    assert (found.plan, found.linear, found.geometry) == ("18,20", "kda", counted)
    with pytest.raises(HyLoError, match=f"geometry is {re.escape(counted)}, .* the layers get"):
        recipe(recipe=kind, plan=str(file), geometry=wrong)


def test_a_wrong_geometry_is_refused():
    with pytest.raises(HyLoError, match="^--geometry 'wide': expected one of native, published"):
        recipe(geometry="wide")
