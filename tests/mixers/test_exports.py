"""Every mixer's folder has what exported models and vLLM ask of it."""

import os
import subprocess
import sys
from collections import Counter
from dataclasses import fields

import pytest
from helpers.hf import model_of, tiny_config

from hylo_megatron.hf import config_values
from hylo_megatron.hf.config_values import HYBRID, described
from hylo_megatron.mixers import MIXERS
from hylo_megatron.mixers.dimensions import config_fields, config_to_geometry, geometry_to_config
from hylo_megatron.serve.geometry import serve
from hylo_megatron.serve.weights import Padding, served_weights

each_mixer = pytest.mark.parametrize("name", HYBRID)


@each_mixer
def test_config_json_has_every_dimension_once(name):
    entry, config = MIXERS[name], tiny_config((name,))
    assert sorted(config_fields(entry).values()) == sorted(field.name for field in fields(entry.geometry))
    geometry = config_to_geometry(entry, config)
    assert geometry_to_config(entry, geometry).items() <= config.to_dict().items()
    assert geometry == entry.dimensions(config.geometry())


def test_no_two_mixers_share_a_field_of_config_json():
    counts = Counter(config_values.fields(HYBRID))
    assert max(counts.values()) == 1


def test_fields_of_later_mixers_are_in_their_models_only(monkeypatch):
    monkeypatch.setattr(config_values, "ALWAYS", ("mla", "gdn"))
    assert [entry.name for entry in described(["gdn", "mla"])] == ["mla", "gdn"]
    assert [entry.name for entry in described(["mamba2", "mla"])] == ["mla", "gdn", "mamba2"]


@each_mixer
@pytest.mark.parametrize("changes", [{}, {"qk_norm": True, "q_lora_rank": None}])
def test_every_exported_tensor_has_a_place_in_vllm(name, changes):
    model = model_of((name,), **changes)
    geometry, heads = model.config.geometry(), model.config.num_attention_heads
    served = serve(geometry, {name}, heads, model.config.qk_norm, on_gpu=False).geometry
    padding = Padding(trained=geometry, served=served, heads=heads, kinds=frozenset((name,)))
    state = model.state_dict()
    places = [(place, part) for place, _, part in served_weights(state.items(), padding)]
    assert len(set(places)) == len(state)


@each_mixer
def test_what_planner_and_plugin_read_needs_no_torch(name):
    code = f"""
import sys
from hylo_megatron.mixers import MIXERS
for part in ("geometry", "serving"):
    MIXERS[{name!r}].part(part)
assert not [module for module in ("torch", "transformers", "vllm", "megatron") if module in sys.modules]
"""
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HYLO_REGISTER": "0"})
