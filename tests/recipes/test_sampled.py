"""Text sampled from the teacher in a recipe's mix."""

from dataclasses import replace

import pytest
from helpers import text, tiny

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from hylo_megatron.data.token_files import read_summary  # noqa: E402
from hylo_megatron.recipes.smollm2 import smollm2_cpu, smollm2_gpu  # noqa: E402
from hylo_megatron.run.datasets import NAMES, data_path, make_datasets  # noqa: E402
from hylo_megatron.run.sampled import sampled_tokens, with_sampled, write_sampled  # noqa: E402


@pytest.mark.parametrize("recipe", [smollm2_cpu(), smollm2_gpu()], ids=lambda recipe: recipe.name)
def test_the_share_is_one_of_the_plain_text(recipe):
    assert with_sampled(recipe, 0.0) is recipe and sampled_tokens(recipe) == 0
    mixed = with_sampled(recipe, 0.25)
    for before, stage in zip(recipe.stages, mixed.stages, strict=True):
        old, new = dict(before.mix or (("text", 1.0),)), dict(stage.mix)
        assert sum(new.values()) == pytest.approx(1) and set(new) <= set(NAMES)
        plain = old.get("text", 0) + old.get("long", 0)
        assert new["sampled"] == pytest.approx(0.25 * plain)
        assert all(new[name] == part for name, part in old.items() if name not in ("text", "long"))
    assert sampled_tokens(mixed) >= 0.25 * sum(
        stage.tokens * sum(part for name, part in (stage.mix or (("text", 1.0),)) if name in ("text", "long"))
        for stage in recipe.stages
    )
    assert set(dict(with_sampled(recipe, 1.0).stages[0].mix)) & {"text", "long"} == set()


def test_a_recipe_samples_its_text_and_packs_it(tmp_path):
    teacher = tiny.save_model(tiny.teacher_model("smollm2"), tmp_path / "hf")
    text.make_tokenizer(teacher)
    stage = replace(smollm2_cpu().stages[0], seq_length=32, steps=1, global_batch=1)
    recipe = with_sampled(replace(smollm2_cpu(), stages=(stage,)), 1.0)
    (tmp_path / "data").mkdir()
    small = ("--length", "48", "--rows-per-shard", "8", "--shortest", "1")
    write_sampled(recipe, teacher, tmp_path / "sampled", tmp_path / "data" / "sampled", teacher, small)
    make_datasets(recipe, tmp_path / "data", teacher)
    (share, prefix) = data_path(tmp_path / "data", recipe.stages[0])
    summary = read_summary(prefix)
    assert share == "1.0" and summary["pack_length"] == 33
    assert summary["sequences"] >= recipe.stages[0].samples(1.0)
