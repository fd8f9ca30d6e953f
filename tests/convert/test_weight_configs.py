"""Configurations, right and spoilt: what is converted has transformers' logits, and the rest is refused."""

import json
import math
import shutil

import pytest
import torch

pytest.importorskip("transformers")
from helpers import weight_folders as folders
from helpers.weight_folders import SAME, convert
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hylo_megatron.errors import HyLoError

FEW = settings(max_examples=8, deadline=None, derandomize=True,
               suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])  # fmt: skip


@pytest.mark.parametrize("kind", folders.MODEL_TYPES)
@FEW
@given(data=st.data())
def test_what_is_converted_has_the_logits_of_transformers(kind, data, tmp_path):
    raw, shards = data.draw(folders.configs(kind)), data.draw(st.sampled_from([1, 2]))
    dtype = data.draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.float64]))
    shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    source = folders.write_folder(tmp_path / "hf", raw, shards, dtype)
    convert(source, tmp_path / "ckpt", check=False)
    assert folders.difference(source, tmp_path / "ckpt") < SAME


_JUNK = st.sampled_from(
    [None, 0, -1, 1, 2, 0.5, 2.5, "x", "64", True, False, [], [1], {}, {"a": 1}, 10**30, 1e300, 1e-300, math.nan]
)
_FIELDS = st.sampled_from(
    ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "rms_norm_eps",
     "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings", "rope_theta", "rope_scaling",
     "rope_parameters", "sliding_window", "use_sliding_window", "layer_types", "max_window_layers", "hidden_act",
     "attention_bias", "mlp_bias", "partial_rotary_factor", "original_max_position_embeddings", "is_causal",
     "eos_token_id", "quantization_config", "logit_scale", "per_layer_config", "dtype", "attention_dropout",
     "initializer_range", "pretraining_tp", "use_cache", "model_type"]
)  # fmt: skip
_ROPE_FIELDS = st.sampled_from(
    ["rope_type", "type", "rope_theta", "factor", "original_max_position_embeddings", "attention_factor", "beta_fast",
     "beta_slow", "mscale", "mscale_all_dim", "truncate", "low_freq_factor", "high_freq_factor", "short_factor",
     "partial_rotary_factor", "full_attention"]
)  # fmt: skip
_OTHER_VALUES = st.sampled_from(
    [("sliding_window", 8), ("layer_types", ["sliding_attention"] * 2), ("layer_types", ["chunked_attention"] * 2),
     ("hidden_act", "gelu"), ("use_sliding_window", True), ("num_key_value_heads", 3), ("attention_bias", True)]
)  # fmt: skip


@st.composite
def _spoilt(draw, kind: str) -> tuple[dict, dict]:
    """A config that we compute, and the same with one or two fields changed or taken away."""
    good = draw(folders.configs(kind))
    bad = json.loads(json.dumps(good))
    for _ in range(draw(st.integers(1, 2))):
        rope = next((bad[key] for key in ("rope_scaling", "rope_parameters") if isinstance(bad.get(key), dict)), bad)
        target, field, value = draw(st.sampled_from([bad, rope])), None, None
        if target is bad and draw(st.integers(0, 3)) == 0:
            field, value = draw(_OTHER_VALUES)
        else:
            field = draw(_FIELDS if target is bad else _ROPE_FIELDS)
            kinds = st.sampled_from(["default", "dynamic", "longrope", "yarn", "llama3", "proportional", "su"])
            value = draw(kinds if field in ("rope_type", "type") else _JUNK)
        if draw(st.integers(0, 4)) == 0:
            target.pop(field, None)
        else:
            target[field] = value
    return good, bad


@pytest.mark.parametrize("kind", folders.MODEL_TYPES)
@settings(FEW, max_examples=20)
@given(data=st.data())
def test_a_spoilt_config_is_computed_as_transformers_does_or_refused(kind, data, tmp_path):
    good, bad = data.draw(_spoilt(kind))
    shutil.rmtree(tmp_path / "hf", ignore_errors=True)
    source = folders.write_folder(tmp_path / "hf", good)
    (source / "config.json").write_text(json.dumps(bad))
    try:
        convert(source, tmp_path / "ckpt", check=False)
    except HyLoError as error:
        assert "\n" not in str(error) and str(source) in str(error)
        return
    assert folders.difference(source, tmp_path / "ckpt") < SAME
