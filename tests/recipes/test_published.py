"""The numbers of the published recipes, as the method's tables have them."""

from dataclasses import replace

import pytest

from hylo_megatron.config import GDNGeometry, Mamba2Geometry, MLAGeometry, Plan, geometry_preset
from hylo_megatron.recipes.proxy import proxy, small_geometry
from hylo_megatron.recipes.published import BASES, published
from hylo_megatron.recipes.shapes import recipe_named
from hylo_megatron.run.examples import job_of

# layers, MLA layers, lr of the KL stages, batches at 8K and 64K with GDN and with Mamba-2
TABLE = {
    "llama1b": (16, (1, 5, 10, 14), 6e-5, (32, 8), (32, 8)),
    "llama3b": (28, (0, 5, 10, 16, 21, 26), 4e-5, (16, 8), (16, 8)),
    "qwen1p7b": (28, (1, 5, 9, 13, 17, 21, 25), 6e-5, (16, 8), (32, 8)),
}
GEOMETRIES = {
    "llama1b": (MLAGeometry(128, 32, 32, 64, 1344), GDNGeometry(6, 6, 256, 512), Mamba2Geometry(32, 64, 64, 32)),
    "llama3b": (MLAGeometry(128, 64, 64, 128, 1536), GDNGeometry(9, 9, 256, 512), Mamba2Geometry(24, 128, 128, 24)),
    "qwen1p7b": (MLAGeometry(256, 64, 64, 128, 1344), GDNGeometry(6, 6, 256, 512), Mamba2Geometry(16, 128, 128, 16)),
}
YARN = {  # factors at 2K, 8K and 64K, and the window they stretch
    "llama1b": (None, 4.0, 32.0, 2048),
    "llama3b": (None, 4.0, 32.0, 2048),
    "qwen1p7b": (None, None, 2.0, 32768),
}


@pytest.mark.parametrize("linear", ["gdn", "mamba2"])
@pytest.mark.parametrize("name", TABLE)
def test_stages(name, linear):
    layers, mla, lr, gdn_batches, mamba2_batches = TABLE[name]
    recipe = published(name, linear=linear)
    ild, *distill = recipe.stages
    plan = Plan.parse(recipe.layers, recipe.plan, recipe.linear)
    assert len(plan) == layers and tuple(i for i, kind in enumerate(plan) if kind == "mla") == mla
    assert {kind for kind in plan if kind != "mla"} == {linear}
    assert (ild.kind, ild.seq_length, ild.lr, ild.min_lr) == ("ild", 2048, 2e-4, 0.0)
    assert [stage.seq_length for stage in distill] == [2048, 8192, 65536]
    batches = tuple(stage.global_batch for stage in distill[1:])
    assert batches == (gdn_batches if linear == "gdn" else mamba2_batches)
    assert {stage.lr for stage in distill} == {lr}
    assert {(stage.kl_weight, stage.ce_weight, stage.teacher_length) for stage in distill} == {(1.0, 0.0, None)}
    assert {stage.warmup for stage in recipe.stages} == {0.01}
    *factors, window = YARN[name]
    for stage, factor in zip(distill, factors, strict=True):
        rope = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": window}
        assert stage.rope == (rope if factor else None)


@pytest.mark.parametrize("tokens", [10**9, 10**10])
@pytest.mark.parametrize("name", TABLE)
def test_tokens(name, tokens):
    recipe = published(name, tokens=tokens)
    total = sum(stage.tokens for stage in recipe.stages)
    assert total == pytest.approx(tokens, rel=0.01)
    assert recipe.stages[0].tokens == pytest.approx(0.2 * total, rel=0.01)


@pytest.mark.parametrize("name", TABLE)
def test_dimensions(name):
    base = BASES[name]
    geometry = geometry_preset("published", base.hidden, base.heads, base.head_dim)
    assert (geometry.mla, geometry.gdn, geometry.mamba2) == GEOMETRIES[name]
    assert geometry.gdn.num_key_heads * geometry.gdn.key_head_dim == base.hidden * 3 // 4
    assert geometry.mamba2.num_heads * geometry.mamba2.head_dim == base.hidden  # expand 1


@pytest.mark.parametrize(
    "name, plan, linear",
    [("llama1b", "8MLA8M2", "mamba2"), ("llama3b", "14MLA14GDN", "gdn"), ("qwen1p7b", "14MLA14GDN", "gdn")],
)
def test_variants(name, plan, linear):
    recipe = published(name, plan, linear)
    parsed = Plan.parse(recipe.layers, recipe.plan, recipe.linear)
    assert parsed.name == plan
    assert [i for i, kind in enumerate(parsed) if kind == "mla"] == list(range(0, recipe.layers, 2))


def test_a_plan_says_its_linear_mixer(tmp_path, monkeypatch):
    """Qwen's batches at 8K are 16 with GDN and 32 with Mamba-2."""
    file = tmp_path / "plan.json"
    file.write_text('{"num_layers": 28, "mla_layers": [1, 5], "linear": "mamba2"}')
    monkeypatch.setenv("PROXY", "1")
    for plan in ("7MLA21M2", str(file)):
        for recipe in (published("qwen1p7b", plan), recipe_named("qwen1p7b", plan)):
            assert (recipe.linear, recipe.stages[2].global_batch) == ("mamba2", 32)
        monkeypatch.setenv("PLAN", plan)
        assert job_of("qwen1p7b").recipe.linear == "mamba2"
    assert recipe_named("qwen1p7b", "7MLA21KDA").linear == "kda"
    assert recipe_named("qwen1p7b", "1,5").linear == "gdn"


@pytest.mark.parametrize("name", TABLE)
def test_a_proxy_keeps_the_recipe(name):
    recipe, base = published(name), BASES[name]
    small = proxy(recipe, base)
    assert (small.plan, small.layers, small.linear, small.init) == (recipe.plan, recipe.layers, recipe.linear, "svd")
    for mine, real in zip(small.stages, recipe.stages, strict=True):
        assert (mine.name, mine.lr, mine.train, mine.recompute) == (real.name, real.lr, real.train, real.recompute)
        assert bool(mine.rope) == bool(real.rope)
    assert small.stages[-1].rope["factor"] == {"qwen1p7b": 2.0}.get(name, 4.0)
    assert small_geometry(base).gdn.num_key_heads * small_geometry(base).gdn.key_head_dim == base.hidden // 16 * 3 // 4


def test_levers_are_flags_and_show_only_where_they_are_used():
    stage = published("llama1b").stages[1]
    assert set(stage.to_dict()).isdisjoint({"loss", "ce_from", "hidden_weight"}) and "--hylo-loss" not in stage.flags()
    changed = replace(stage, loss="jsd", jsd_beta=0.3, ce_from=0.5)
    shown = {"loss": "jsd", "jsd_beta": 0.3, "ce_from": 0.5}
    assert changed.to_dict() == stage.to_dict() | shown
    flags = changed.flags()
    assert [flags[flags.index(f"--hylo-{name}") + 1] for name in ("loss", "jsd-beta", "ce-from")] == [
        "jsd",
        "0.3",
        "0.5",
    ]
