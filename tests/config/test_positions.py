"""Settings of positions: rotation off in MLA, a scale of queries; flags, files, refusals and the start of a stage."""

import argparse
import math
from dataclasses import replace

import pytest
import torch
from helpers import tiny

from hylo_megatron.config import Architecture, positions
from hylo_megatron.config.layout import ParallelLayout
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser
from hylo_megatron.kernels.rope import query_scale, scaled
from hylo_megatron.mixers.memory import Share
from hylo_megatron.mixers.mla.memory import tables
from hylo_megatron.recipes.stage import Stage

NOPE = tiny.hybrid("gdn", mla_rope=False, log_scale=tiny.LOG_SCALE)
STAGE = Stage(name="distill", kind="distill", seq_length=64, global_batch=1, steps=1, lr=1e-4)


def parsed(*flags: str) -> dict:
    parser = Parser()
    positions.add_flags(parser.add_argument)
    return positions.given(parser.parse_args(flags))


def test_flags_give_settings_and_nothing_else():
    assert parsed() == {}
    assert parsed("--mla-rope", "off", "--log-scale", "600") == {
        "mla_rope": False, "log_scale": {"base": 600.0, "length": 0},
    }  # fmt: skip
    assert parsed("--mla-rope", "on", "--log-scale", "off") == {"mla_rope": True, "log_scale": None}
    assert parsed("--log-scale", "0,2048")["log_scale"] == {"base": 0.0, "length": 2048}


@pytest.mark.parametrize(
    "text", ["", "x", "1", "0", "-5", "nan", "inf", "600,", "600,x", "600,1.5", "600,-1", "600,2,3"]
)
def test_scales_that_cannot_be_computed_are_refused(text):
    with pytest.raises(argparse.ArgumentTypeError, match="expected off, or BASE"):
        positions.log_scale(text)
    with pytest.raises(HyLoError, match="argument --mla-rope: 'none': expected on or off"):
        parsed("--mla-rope", "none")


def test_a_window_has_a_size_and_sinks():
    assert positions.window("256") == {"size": 256, "sinks": 4} and positions.window("16+0") == {
        "size": 16,
        "sinks": 0,
    }
    assert positions.window("off") == {} and positions.window("16+0:all") == {"size": 16, "sinks": 0, "mla": True}
    wrong = "", "off:all", ":all", "256+4:mla", "0", "x", "+4", "256+", "256+4+1", "-1", "256+65", "8193", "٣", "1e3"
    for text in (*wrong, "9" * 5000):
        with pytest.raises(argparse.ArgumentTypeError, match="expected off, or SIZE.+SINKS. with"):
            positions.window(text)


@pytest.mark.parametrize("window, layers", [(tiny.WINDOW, 2), (tiny.WINDOWS, 4)])
def test_the_cache_of_windows_has_one_size_for_every_text(window, layers):
    arch = tiny.hybrid("gdn", window=window)
    assert Architecture.from_dict(arch.to_dict()) == arch and arch.to_dict()["window"] == window
    assert arch.window_bytes() == layers * (2 * 2 * 16) * 8 * 2  # values of a row, rows, bytes
    assert arch.kv_bytes_per_token() == tiny.hybrid("gdn").kv_bytes_per_token()
    assert tiny.hybrid("gdn").window_bytes() == arch.as_teacher().window_bytes() == 0


def test_the_scale_is_that_of_the_paper_and_starts_at_the_trained_length():
    t = torch.tensor([0, 1, 100, 5000, 250_000])
    paper = torch.log(t + 500.0) / math.log(500.0)  # arXiv 2601.22156
    torch.testing.assert_close(query_scale(t, {"base": 500.0, "length": 0})[:, 0], paper)
    later = query_scale(t, {"base": 0.0, "length": 2048})[:, 0]
    torch.testing.assert_close(later[:3], torch.ones(3))
    torch.testing.assert_close(later[3:], torch.log(t[3:]) / math.log(2048))
    both = query_scale(t, {"base": 500.0, "length": 2048})[:, 0]
    assert (both[:3] == 1).all() and (both[3:] > 1).all() and (both[3:] < later[3:]).all()
    x = torch.full((5, 3), 1.01, dtype=torch.bfloat16)
    assert scaled(x, both[:, None]).dtype == x.dtype and torch.equal(scaled(x, both[:, None])[0], x[0])


def test_files_of_models_without_the_settings_are_as_before():
    plain = tiny.hybrid("gdn").to_dict()
    assert not plain.keys() & positions.FIELDS.keys()
    assert Architecture.from_dict(plain) == tiny.hybrid("gdn")
    assert Architecture.from_dict(NOPE.to_dict()) == NOPE
    assert NOPE.as_teacher() == tiny.hybrid("gdn").as_teacher()


@pytest.mark.parametrize("changes, words", [
    (dict(mla_rope=False, plan=("gdn",) * 4), "mla_rope is False, but the plan has no mla layers"),
    (dict(log_scale=tiny.LOG_SCALE, plan=("gdn",) * 4), "but the plan has no mla layers"),
    (dict(log_scale={"base": 0.5, "length": 0}), "log_scale is {'base': 0.5, 'length': 0}, expected"),
    (dict(log_scale={"base": 600.0}), "field log_scale.length is missing"),
    (dict(log_scale={"base": 600.0, "length": 0, "slope": 1}), "field log_scale.slope is unknown"),
    (dict(mla_rope="off"), "field mla_rope is 'off'"),
    (dict(window={"size": 8, "sinks": 2}, plan=("mla",) * 4), "but the plan has no linear layers"),
    (dict(window=tiny.WINDOWS, plan=("gdn",) * 4), "but the plan has no mla layers"),
    (dict(window=tiny.WINDOW | {"mla": False}), "field window.mla is False"),
    (dict(window={"size": 0, "sinks": 2}), "field window.size is 0"),
    (dict(window={"size": 8}), "field window.sinks is missing"),
])  # fmt: skip
def test_files_with_settings_that_nothing_computes_are_refused(changes, words):
    with pytest.raises(HyLoError) as refused:
        Architecture.from_dict(replace(tiny.hybrid("gdn"), **changes).to_dict())
    assert words in str(refused.value) and "\n" not in str(refused.value)


def test_a_stage_has_the_flags_of_its_settings():
    assert not [flag for flag in STAGE.flags() if "mla-rope" in flag or "log-scale" in flag]
    flags = replace(STAGE, mla_rope=False, log_scale="600,64").flags()
    assert flags[flags.index("--hylo-mla-rope") + 1] == "off"
    assert flags[flags.index("--hylo-log-scale") + 1] == "600,64"
    assert "on" in replace(STAGE, mla_rope=True).flags()


def test_a_control_has_no_layers_for_the_settings():
    from hylo_megatron.recipes.smollm2 import smollm2_cpu

    recipe = smollm2_cpu()
    nope = replace(recipe, stages=tuple(replace(stage, mla_rope=False, log_scale="600") for stage in recipe.stages))
    assert nope.as_control().stages == recipe.as_control().stages
    assert "window" not in recipe.to_dict() and recipe.settings == {"linear_rope": False}
    wide = replace(recipe, window="128+2")
    assert wide.to_dict()["window"] == "128+2" and wide.settings["window"] == {"size": 128, "sinks": 2}
    assert "window" not in wide.as_control().to_dict()
    everywhere = replace(recipe, window="128+2:all")
    assert everywhere.to_dict()["window"] == "128+2:all" and everywhere.settings["window"]["mla"] is True


@pytest.mark.parametrize("window", ["off", {}, None])
def test_a_recipe_without_a_window_has_no_setting_of_it(window):
    from hylo_megatron.recipes.smollm2 import smollm2_cpu

    recipe = replace(smollm2_cpu(), window=window)
    assert recipe.window is None and recipe == smollm2_cpu() and "window" not in recipe.settings


@pytest.mark.parametrize("window", ["256,4", "9000", {"size": 8, "sinks": 2}])
def test_a_recipe_with_a_wrong_window_is_refused_when_it_is_made(window):
    from hylo_megatron.recipes.smollm2 import smollm2_cpu

    with pytest.raises(HyLoError, match="^window .*: expected off, or SIZE"):
        replace(smollm2_cpu(), window=window)


def test_the_planner_counts_the_tables_that_there_are():
    share = Share(ParallelLayout(), 1, 64)
    plain, scale = tiny.hybrid("gdn"), replace(NOPE, mla_rope=True)
    assert tables(NOPE, share) == 4 * 64 and tables(scale, share) == tables(plain, share) + 4 * 64
