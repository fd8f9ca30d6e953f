"""What a kind of stage trains, by both spellings of names; the numbers that trainer and planner share."""

import os
import subprocess
import sys

import pytest
from helpers import tiny
from hypothesis import given
from hypothesis import strategies as st

from hylo_megatron.config.decisions import is_new, taught_length, token_chunks
from hylo_megatron.config.stages import STAGE_KINDS, TRAIN, stage_kind
from hylo_megatron.convert.tables import mappings
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers import FAST_SUFFIXES, FP32_SUFFIXES, LINEAR


@pytest.mark.parametrize("linear", LINEAR)
@pytest.mark.parametrize("changes", [dict(mla_qk_norm=True), dict(tie_word_embeddings=False)], ids=["norm", "untied"])
def test_both_names_of_a_parameter_get_the_same_answer(linear, changes):
    """The trainer asks with Megatron's names, the planner with Hugging Face's."""
    entries = mappings(tiny.hybrid(linear, **changes))
    assert entries
    for entry in entries:
        names = (*entry.megatron, *entry.hf)
        assert len({is_new(name) for name in names}) == 1, entry
        for suffixes in (FP32_SUFFIXES, FAST_SUFFIXES):
            assert len({name.endswith(suffixes) for name in names}) == 1, entry
        for kind in STAGE_KINDS.values():
            for train in TRAIN:
                assert len({kind.trains(name, train) for name in names}) == 1, entry


def test_what_each_kind_trains():
    names = ("model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "model.layers.0.mixer.A_log")
    trained = {
        (kind.name, train): [kind.trains(name, train) for name in names]
        for kind in STAGE_KINDS.values()
        for train in TRAIN
    }
    assert trained == {
        ("ild", "all"): [False, True, True],
        ("ild", "mixers"): [False, False, True],
        ("distill", "all"): [True, True, True],
        ("distill", "mixers"): [False, False, True],
    }


def test_an_unknown_kind_is_refused():
    with pytest.raises(HyLoError, match="'sft': expected one of ild, distill"):
        stage_kind("sft")


@given(st.integers(1, 5000), st.integers(0, 5000), st.integers(1, 2000))
def test_chunks_are_every_token_once_and_of_one_sort(tokens, taught, chunk):
    taught = min(taught, tokens)
    spans = token_chunks(tokens, taught, chunk)
    assert [row for span, _ in spans for row in range(span.start, span.stop)] == list(range(tokens))
    for span, has_teacher in spans:
        assert 0 < span.stop - span.start <= chunk
        assert (span.stop <= taught) if has_teacher else (span.start >= taught)


def test_a_teacher_reads_everything_that_is_shared():
    assert taught_length(100, None, shared=False) == 100
    assert taught_length(100, 30, shared=False) == 30
    assert taught_length(100, 300, shared=False) == 100
    assert taught_length(100, 30, shared=True) == 100


def test_configuration_needs_no_torch():
    modules = "architecture decisions layout plan stages geometry"
    code = "; ".join(f"import hylo_megatron.config.{name}" for name in modules.split())
    code += "; import sys; assert not {'torch', 'megatron', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"HYLO_REGISTER": "0"})
