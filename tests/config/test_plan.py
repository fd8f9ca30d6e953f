"""Layer plans as values: names and numbers round trip, and pipeline stages divide the layers."""

import copy
import json
import pickle
from dataclasses import asdict

import pytest
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st

from hylo_megatron.config import Architecture, Plan
from hylo_megatron.config.plan import linear_of_plan
from hylo_megatron.mixers import LINEAR, MIXERS

KINDS = st.sampled_from(tuple(MIXERS))
PLANS = st.lists(KINDS, min_size=1, max_size=80).map(Plan)


@st.composite
def hybrids(draw) -> Plan:
    """Plans of MLA and one linear mixer, in any order."""
    linear = draw(st.sampled_from(LINEAR))
    return Plan(draw(st.lists(st.sampled_from(("mla", linear)), min_size=1, max_size=80)))


@given(hybrids())
def test_numbers_of_mla_layers_round_trip(plan):
    text = ",".join(str(layer) for layer, kind in enumerate(plan) if kind == "mla") or "none"
    assert Plan.parse(len(plan), text, plan.linear_kind) == plan


@given(st.integers(1, 80), st.integers(0, 80), st.sampled_from(LINEAR))
def test_names_round_trip(layers, count, linear):
    short = MIXERS[linear].short
    name = f"{min(count, layers)}MLA{layers - min(count, layers)}{short}"
    plan = Plan.parse(layers, name)
    assert len(plan) == layers and plan.count("mla") == min(count, layers)
    assert linear_of_plan(name) == linear
    assert plan.name == name.replace("0MLA", "", 1) if name.startswith("0MLA") else plan.name in (name, f"{layers}MLA")


@given(PLANS)
def test_a_name_counts_every_mixer(plan):
    assert plan.name == "".join(f"{plan.count(kind)}{MIXERS[kind].short}" for kind in MIXERS if kind in plan)


@given(PLANS, st.integers(1, 20))
def test_stages_divide_the_layers_and_the_pattern(plan, pipeline_stages):
    pipeline_stages = min(pipeline_stages, len(plan))
    stages = plan.stages(pipeline_stages)
    assert [layer for stage in stages for layer in stage] == list(range(len(plan)))
    sizes = [len(stage) for stage in stages]
    assert sizes == sorted(sizes, reverse=True) and sizes[0] - sizes[-1] <= 1
    parts = plan.pattern(pipeline_stages).split("|")
    assert [len(part) // 2 for part in parts] == sizes
    assert "".join(parts) == plan.pattern() == "".join(MIXERS[kind].symbol + "-" for kind in plan)


@given(PLANS)
def test_a_plan_is_a_tuple_of_names(plan):
    for made in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan)), Plan(json.loads(json.dumps(plan)))):
        assert isinstance(made, Plan) and made == plan == tuple(plan)


@pytest.mark.parametrize("text", ["1,5", "uniform:4", "all", "M2", "4MLA12RWKV"])
def test_only_names_say_a_linear_mixer(text):
    assert linear_of_plan(text) is None


def test_architectures_have_a_plan_however_they_are_made():
    arch = tiny.hybrid()
    for made in (arch, Architecture.from_dict(arch.to_dict()), Architecture(**asdict(arch) | {"geometry": None})):
        assert isinstance(made.plan, Plan) and made.plan == arch.plan
    assert isinstance(arch.to_dict()["plan"], list)
    assert arch.as_teacher().plan == Plan.transformer(len(arch.plan))
