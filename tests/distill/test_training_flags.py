"""Flags and variables of a training: what no training can run with is refused."""

import argparse
import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hylo_megatron import flags
from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)

from hylo_megatron.distill import command_line, first_flags
from hylo_megatron.errors import HyLoError
from hylo_megatron.run import examples

NUMBERS = st.one_of(
    st.integers().map(str), st.floats().map(str), st.text(max_size=8),
    st.sampled_from(["1e400", "-0", "9" * 5000, "٣", "1_0", "", " 2", "0x10", "True", "1e7", "10M", "infinity"]),
)  # fmt: skip


@settings(max_examples=60, deadline=None)
@given(NUMBERS)
def test_every_number_is_within_its_limits_or_refused(text):
    kinds = {flags.count: (0, flags.LARGEST), flags.size: (1, flags.LARGEST), flags.weight: (0, math.inf),
             flags.share: (0, 1), flags.positive: (5e-324, math.inf)}  # fmt: skip
    for kind, (low, high) in kinds.items():
        try:
            value = kind(text)
        except argparse.ArgumentTypeError as error:
            assert len(str(error)) < 200 and "expected a" in str(error)
            continue
        assert math.isfinite(value) and low <= value <= high


@settings(max_examples=60, deadline=None)
@given(NUMBERS.filter(lambda text: "\0" not in text and text))
def test_a_variable_is_a_whole_number_or_refused(text):
    with pytest.MonkeyPatch.context() as patch:
        try:
            patch.setenv("STEPS", text)
        except UnicodeEncodeError:  # no environment can hold it
            return
        try:
            value = examples.number("STEPS", 3)
        except HyLoError as error:
            assert str(error).startswith("STEPS=") and len(str(error)) < 200
            return
        assert isinstance(value, int) and 1 <= value <= flags.LARGEST


BAD_VARIABLES = [
    (dict(TP="17"), "TP = 17 does not divide 8 attention heads"),
    (dict(TP="0"), "TP='0': expected a whole number of 1 or more"),
    (dict(PP="17"), "PP = 17 stages for 16 layers"),
    (dict(CP="3"), "do not divide into 2 x CP"),
    (dict(STEPS="inf"), "STEPS='inf'"),
    (dict(TOKENS="1e400"), "TOKENS='1e400'"),
    (dict(SEED="9" * 5000), "SEED='999"),
    (dict(FLAGS='--hylo-log "x'), "no closing quotation"),
    (dict(FLAGS="--lr nan"), "argument --lr: 'nan': expected a number of 0 or more"),
    (dict(PROXY="x"), "PROXY='x': expected 1, or 0"),
    (dict(WINDOW="16+4", PLAN="all"), "window is set, but the plan all has no linear layers: leave one of them out"),
    (dict(FLAGS="--no-such-flag 3"), "FLAGS='--no-such-flag 3': unrecognized arguments: --no-such-flag"),
    (dict(FLAGS="--hylo-jsd-beta 0.3"), "FLAGS=--hylo-jsd-beta: no stage of this recipe has a loss that reads it"),
    (dict(PLAN="1,1"), "PLAN='1,1': numbers must differ"),
    (dict(PLAN="4MLA12GDN", LINEAR="kda"), "PLAN='4MLA12GDN' and LINEAR=kda contradict each other"),
    (dict(LINEAR="mamba"), "LINEAR=mamba: expected one of gdn"),
    (dict(GEOMETRY="small"), "GEOMETRY='small': expected one of native, published"),
    (dict(WINDOW="256+4:mla"), "WINDOW='256+4:mla': expected off, or SIZE[+SINKS]"),
    (dict(GEOMETRY="native:128+32"), "frequencies would not match; GEOMETRY=native takes 16"),
    (dict(WINDOW="off"), "WINDOW=off: expected SIZE+SINKS"),
    (dict(WINDOW="16+4", GEOMETRY="published"), "WINDOW=16+4: needs GEOMETRY=native"),
]


@pytest.mark.parametrize("variables, words", BAD_VARIABLES, ids=lambda v: next(iter(v)) if isinstance(v, dict) else "")
def test_a_proxy_is_checked_like_the_real_thing(monkeypatch, tmp_path, variables, words):
    for name, text in {"PROXY": "1", "OUT": str(tmp_path / "out"), **variables}.items():
        monkeypatch.setenv(name, text)
    with pytest.raises(HyLoError) as refused:
        job = examples.job_of("llama1b")
        job.check(examples.processes_of(None))
    assert words in str(refused.value) and "\n" not in str(refused.value)
    assert not (tmp_path / "out").exists()


def test_a_published_recipe_with_a_window_has_positions_in_its_linear_layers(monkeypatch, tmp_path):
    monkeypatch.setenv("PROXY", "1")
    monkeypatch.setenv("OUT", str(tmp_path))
    monkeypatch.setenv("WINDOW", "16+4:all")
    job = examples.job_of("llama1b")
    job.check(examples.processes_of(None))
    recipe = job.recipe
    assert (recipe.window, recipe.linear_rope, recipe.init) == ("16+4:all", True, "data")
    assert [stage.mla_rope for stage in recipe.stages] == [None, False, None, None]
    assert all(stage.rope is None for stage in recipe.stages)
    monkeypatch.setenv("LINEAR", "mamba2")  # has no queries that can rotate, so MLA keeps its positions
    recipe = examples.job_of("llama1b").recipe
    assert (recipe.window, recipe.linear_rope) == ("16+4:all", False)
    assert recipe.stages[-1].rope and all(stage.mla_rope is None for stage in recipe.stages)


def test_a_flag_that_some_stages_have_is_accepted(monkeypatch, tmp_path):
    for name, text in {"PROXY": "1", "OUT": str(tmp_path), "FLAGS": "--hylo-kl-chunk 64 --hylo-ild-raw-norms"}.items():
        monkeypatch.setenv(name, text)
    examples.job_of("llama1b").check(examples.processes_of(None))


def test_a_proxy_is_checked_as_the_model_that_is_made_later(monkeypatch, tmp_path):
    """The architecture that layouts are checked with is that of the model which is made."""
    from hylo_megatron.convert.hf_config import read_architecture
    from hylo_megatron.recipes.proxy import made_up_texts, write_model
    from hylo_megatron.recipes.published import BASES

    monkeypatch.setenv("PROXY", "1")
    for name in ("llama1b", "qwen1p7b"):
        early = examples.source_of(tmp_path, name, True).architecture()
        write_model(tmp_path / name, BASES[name], made_up_texts(4))
        late = read_architecture(tmp_path / name)
        for field in ("num_attention_heads", "num_key_value_heads", "head_dim", "hidden_size", "plan", "qk_norm"):
            assert getattr(early, field) == getattr(late, field), field


BAD_FLAGS = [
    ("--lr", "nan"), ("--lr", "-1"), ("--min-lr", "inf"), ("--train-iters", "0"), ("--train-iters", "1e3"),
    ("--tensor-model-parallel-size", "0"), ("--micro-batch-size", "-2"), ("--seq-length", "9" * 5000),
    ("--lr-warmup-fraction", "1.5"), ("--hylo-temperature", "-1"), ("--hylo-temperature", "0"),
    ("--hylo-decay-lr-mult", "nan"), ("--hylo-kl-chunk", "0"), ("--hylo-keep-last", "0"),
    ("--hylo-rope", '{"factor": Infinity}'), ("--hylo-rope", "[1]"), ("--hylo-student-iteration", "0"),
]  # fmt: skip


@pytest.mark.parametrize("flag, value", BAD_FLAGS)
def test_values_that_no_training_can_run_with_are_refused(flag, value):
    with pytest.raises(HyLoError, match=f"argument {flag}: .*expected|argument {flag}: .*JSON|should be"):
        command_line.user_flags([flag, value])


def test_flags_are_declared_as_megatron_declares_them():
    from megatron.training.arguments import add_megatron_arguments

    theirs = first_flags.limited(add_megatron_arguments(argparse.ArgumentParser(add_help=False)))
    theirs.set_defaults(cp_comm_type=["auto"])  # as ours
    of = {action.dest: action for action in theirs._actions}
    ours = [action for action in first_flags.first_parser()._actions if action.dest in of]
    named = {*first_flags.WHOLE, *first_flags.TEXTS, *first_flags.LISTS, *first_flags.FULL_LISTS}
    named |= {*first_flags.SWITCHES}
    assert {action.dest for action in ours} == named.union(*first_flags.LIMITS.values())
    for action in ours:
        other = of[action.dest]
        assert action.option_strings == other.option_strings and type(action) is type(other)
        assert (action.nargs, action.default, action.type or str) == (other.nargs, other.default, other.type or str)
