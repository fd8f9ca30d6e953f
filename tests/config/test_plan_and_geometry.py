"""Plans from numbers and words, and the geometries that the names of presets mean."""

from dataclasses import replace

import pytest

pytest.importorskip("transformers")
from helpers import tiny

from hylo_megatron.config import MLAGeometry, Plan, geometry_preset
from hylo_megatron.config.geometry import check_heads
from hylo_megatron.config.plan import uniform_layers
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers.mla.memory import row_values


def where(plan, kind="mla"):
    return tuple(i for i, k in enumerate(plan) if k == kind)


def test_plans_from_numbers_and_words():
    plan = Plan.parse(16, "1,5,10,14", "mamba2")
    assert where(plan) == (1, 5, 10, 14)
    assert plan.count("mamba2") == 12
    assert Plan.parse(4, "all") == ("mla",) * 4
    assert Plan.parse(4, "none", "mamba2") == ("mamba2",) * 4
    assert where(Plan.parse(30, "uniform:3")) == (5, 15, 25)
    assert where(Plan.parse(16, "uniform:16")) == tuple(range(16))
    assert plan.name == "4MLA12M2"
    assert Plan.transformer(30).name == "30ATT"


@pytest.mark.parametrize("count", range(1, 13))
def test_uniform_layers_are_apart_by_about_the_same(count):
    layers = uniform_layers(28, count)
    gaps = [b - a for a, b in zip(layers, layers[1:], strict=False)]
    assert len(set(layers)) == count and layers[0] >= 0 and layers[-1] < 28
    assert not gaps or max(gaps) - min(gaps) <= 1


@pytest.mark.parametrize(
    "layers, name, mla, linear",
    [
        (16, "4MLA12GDN", (1, 5, 10, 14), "gdn"),
        (16, "4MLA12M2", (1, 5, 10, 14), "mamba2"),
        (16, "8MLA8GDN", tuple(range(0, 16, 2)), "gdn"),
        (28, "6MLA22M2", (0, 5, 10, 16, 21, 26), "mamba2"),
        (28, "7MLA21GDN", (1, 5, 9, 13, 17, 21, 25), "gdn"),
        (28, "14MLA14mamba2", tuple(range(0, 28, 2)), "mamba2"),
        (10, "2MLA8GDN", (2, 7), "gdn"),
        (30, "3MLA27KDA", (4, 14, 24), "kda"),
    ],
)
def test_names_put_mla_where_the_paper_does(layers, name, mla, linear):
    plan = Plan.parse(layers, name)
    assert Plan.parse(layers, name, linear) == plan
    assert where(plan) == mla
    assert set(plan) == {"mla", linear}


@pytest.mark.parametrize(
    "layers, text, linear, words",
    [
        (16, "1,5,16", "gdn", "16"), (16, "1,-2", "gdn", "-2"), (16, "1,1", "gdn", "differ"),
        (16, "1;2", "gdn", "expected layer numbers"), (16, "", "gdn", "expected layer numbers"),
        (16, "4MLA12GDN", "mamba2", "contradict"), (4, "uniform:5", "gdn", "only 4 layers"),
        (4, "uniform:0", "rwkv", "rwkv"),
        (16, "4MLA10GDN", "gdn", "has 14 layers"), (16, "4MLA12RWKV", "gdn", "RWKV"),
    ],
)  # fmt: skip
def test_plans_that_do_not_fit(layers, text, linear, words):
    with pytest.raises(HyLoError) as caught:
        Plan.parse(layers, text, linear)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_megatron_pattern_has_a_pipe_between_stages_and_the_odd_layers_first():
    plan = Plan(("mla", "gdn", "mamba2", "attention", "gdn", "mla", "gdn"))
    assert plan.pattern() == "+-G-M-*-G-+-G-"
    assert plan.pattern(2) == "+-G-M-*-|G-+-G-"
    assert plan.pattern(3) == "+-G-M-|*-G-|+-G-"
    assert plan.pattern(7).count("|") == 6
    with pytest.raises(HyLoError, match="7 layers"):
        plan.pattern(8)


PUBLISHED = [  # d, heads, head dim: kv_lora, nope, rope, v, q_lora; GDN heads
    ((2048, 32, 64), (128, 32, 32, 64, 1344), 6),
    ((3072, 24, 128), (128, 64, 64, 128, 1536), 9),
    ((2048, 16, 128), (256, 64, 64, 128, 1344), 6),
]


@pytest.mark.parametrize("base, mla, gdn_heads", PUBLISHED)
def test_published_geometry(base, mla, gdn_heads):
    g = geometry_preset("published", *base)
    hidden, _, head_dim = base
    assert tuple(vars(g.mla).values()) == mla
    assert (g.gdn.num_key_heads, g.gdn.key_head_dim) == (gdn_heads, 256)
    assert gdn_heads * 256 == hidden * 3 // 4  # d_k = 0.75 d
    assert g.gdn.num_value_heads * g.gdn.value_head_dim == 2 * gdn_heads * 256  # d_v = 2 d_k
    assert g.mamba2.num_heads * g.mamba2.head_dim == hidden  # expand 1
    assert g.mamba2.num_groups == g.mamba2.num_heads and g.mamba2.state_size == head_dim


@pytest.mark.parametrize("name, layers, base, mla, kept", [
    ("4MLA12GDN", 16, (2048, 32, 64), 8, 3.9), ("8MLA8M2", 16, (2048, 32, 64), 8, 7.8),
    ("6MLA22GDN", 28, (3072, 24, 128), 8, 2.0), ("14MLA14GDN", 28, (3072, 24, 128), 8, 4.7),
    ("7MLA21GDN", 28, (2048, 16, 128), 8, 3.9), ("14MLA14M2", 28, (2048, 16, 128), 8, 7.8),
])  # fmt: skip
def test_published_geometry_keeps_the_published_share_of_the_cache(name, layers, base, mla, kept):
    hidden, heads, head_dim = base
    arch = tiny.hybrid(
        hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=8, head_dim=head_dim,
        plan=Plan.parse(layers, name), geometry=geometry_preset("published", *base),
    )  # fmt: skip
    share = 100 * arch.kv_bytes_per_token() / arch.as_teacher().kv_bytes_per_token()
    assert share == pytest.approx(kept, abs=0.06)


@pytest.mark.parametrize("base", [base for base, *_ in PUBLISHED] + [(576, 9, 64), (896, 14, 64), (4096, 32, 128)])
def test_native_geometry_is_what_engines_run_without_padding(base):
    hidden, heads, head_dim = base
    g = geometry_preset("native", *base)
    assert (g.mla.kv_lora_rank, g.mla.qk_nope_head_dim, g.mla.qk_rope_head_dim) == (256, 64, 64)
    assert g.mla.v_head_dim == head_dim and g.mla.q_lora_rank is None
    assert g.gdn.key_head_dim == g.gdn.value_head_dim == head_dim
    assert g.gdn.num_value_heads == 2 * g.gdn.num_key_heads
    assert g.gdn.num_key_heads == (hidden // 64 if head_dim == 64 else 0.75 * hidden / 128)
    assert (g.mamba2.num_heads, g.mamba2.num_groups) == (heads, heads)
    assert g.mamba2.head_dim == g.mamba2.state_size == head_dim


def test_geometry_that_is_not_there():
    with pytest.raises(HyLoError, match="no published dimensions for d 576.*--geometry native"):
        geometry_preset("published", 576, 9, 64)
    for name in ("small", "native:128", "native:128+x", "native:0+32", "native:128+32+64", "native:"):
        with pytest.raises(HyLoError, match="expected one of native, published, or with another latent"):
            geometry_preset(name, 576, 9, 64)


def test_another_latent_in_the_same_cache():
    """Six layers of 128 + 32 hold what three of 256 + 64 hold, and every frequency is one of the head's."""
    native, split = (geometry_preset(name, 576, 9, 64) for name in ("native", "native:128+32"))
    assert split == replace(native, mla=MLAGeometry(128, 64, 32, 64))
    assert 6 * row_values(split.mla) == 3 * row_values(native.mla)
    check_heads(64, split, {"mla", "gdn"})
    wide = geometry_preset("native:128+32", 3072, 24, 128).mla
    assert (wide.qk_nope_head_dim, wide.qk_rope_head_dim) == (96, 32)
    with pytest.raises(HyLoError, match="qk_rope_head_dim 24 must divide the head dimension 64"):
        check_heads(64, geometry_preset("native:128+24", 576, 9, 64), {"mla"})
