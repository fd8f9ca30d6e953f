"""Parallel layouts that do not fit are refused, with every reason and the nearest ones that do."""

from dataclasses import replace

import pytest
from helpers import tiny

from hylo_megatron.config.layout import ParallelLayout, Work, check_layout, check_parallel_layout, misfits, nearest
from hylo_megatron.errors import HyLoError

TEACHER = tiny.hybrid().as_teacher()


@pytest.mark.parametrize("arch, sizes, words", [
    (tiny.hybrid("gdn"), dict(tp=3), ("TP = 3", "4 attention heads", "[1, 2, 4]")),
    (tiny.hybrid("gdn"), dict(tp=4), ("2 GDN key heads", "[1, 2]")),
    (tiny.hybrid("gdn"), dict(tp=2, cp=2, linear_cp="a2a"), ("TP x CP = 4", "2 GDN key heads")),
    (tiny.hybrid("mamba2"), dict(cp=4, linear_cp="a2a"), ("TP x CP = 4", "2 Mamba-2 groups")),
    (tiny.hybrid("mamba2"), dict(tp=4, cp=4, linear_cp="states"), ("TP = 4", "2 Mamba-2 groups")),
    (TEACHER, dict(tp=4), ("2 key-value heads", "[1, 2]")),
    (tiny.hybrid("gdn"), dict(pp=5), ("PP = 5 stages for 4 layers",)),
])  # fmt: skip
def test_a_model_that_does_not_fit(arch, sizes, words):
    check_layout(arch, tp=2, pp=2, cp=2)
    with pytest.raises(HyLoError) as caught:
        check_layout(arch, **sizes)
    assert "\n" not in str(caught.value)
    assert all(word in str(caught.value) for word in words), caught.value


@pytest.mark.parametrize("features, tp, words", [
    (95, 1, "a rank has 95 MLP features"), (98, 2, "a rank has 49 MLP features"),
    (97, 2, "TP = 2 does not divide 97 MLP features"), (98, 1, None), (92, 2, None),
])  # fmt: skip
def test_mlp_features_that_do_not_divide(features, tp, words):
    found = misfits(replace(tiny.hybrid("gdn"), intermediate_size=features), ParallelLayout(tp=tp))
    assert (words in found[0] and len(found) == 1) if words else not found


@pytest.mark.parametrize("at, work, words", [
    (dict(cp=2), dict(seq_length=62), ("62", "2 x CP = 4 chunks")),
    (dict(tp=2, cp=2, sequence_parallel=True), dict(seq_length=20), ()),
    (dict(tp=2, sequence_parallel=True), dict(seq_length=63), ("63 tokens", "TP = 2")),
    (dict(tp=2), dict(processes=3), ("3 processes", "TP x PP x CP = 2")),
    (dict(tp=2), dict(processes=8, micro_batch=2, global_batch=12), ("global batch of 12", "DP = 8")),
])  # fmt: skip
def test_work_that_does_not_divide(at, work, words):
    found = misfits(tiny.hybrid("gdn"), ParallelLayout(**at), Work(**work))
    assert len(found) == bool(words)
    assert all(word in found[0] for word in words)


def test_layouts_near_by_are_named_and_fit():
    models, work = (
        {"student": tiny.hybrid("gdn"), "teacher": replace(TEACHER, num_key_value_heads=1)},
        Work(processes=8, seq_length=64, micro_batch=1, global_batch=8),
    )
    asked = ParallelLayout(tp=2, pp=2, cp=2)
    with pytest.raises(HyLoError) as caught:
        check_parallel_layout(models, asked, work)
    assert "teacher: TP = 2 does not divide 1 key-value heads" in str(caught.value)
    others = nearest(models, asked, work)
    assert others[0] in [ParallelLayout(pp=pp, cp=cp) for pp, cp in ((2, 2), (4, 2), (2, 4))]
    for other in others:
        assert str(other) in str(caught.value)
        check_parallel_layout(models, other, work)


def test_no_layout_at_all():
    work = Work(processes=4, seq_length=63, micro_batch=3, global_batch=4)
    with pytest.raises(HyLoError, match="no layout of this many processes fits"):
        check_parallel_layout({"student": tiny.hybrid("gdn")}, ParallelLayout(tp=4), work)
