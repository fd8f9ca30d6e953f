"""The control: the base model itself as student, its export with a stage's rope, and the recipe that trains it."""

import json
from dataclasses import replace

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402
from helpers.recipes import toy_recipe  # noqa: E402

from hylo_megatron.checkpoint.folder import CheckpointReader  # noqa: E402
from hylo_megatron.config import Architecture  # noqa: E402
from hylo_megatron.convert import megatron_to_hf  # noqa: E402
from hylo_megatron.convert.hf_config import read_architecture  # noqa: E402
from hylo_megatron.distill import command_line  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.recipes.smollm2 import smollm2_cpu  # noqa: E402
from hylo_megatron.run.launch import Processes  # noqa: E402
from hylo_megatron.run.recipe_run import Run  # noqa: E402
from hylo_megatron.run.source import Source  # noqa: E402

ROPE = {"rope_theta": 54321.0}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.make_world(tmp_path_factory.mktemp("world"))


def control(world, folder, **flags):
    flags = dict(hylo_control=True, hylo_rope=json.dumps(ROPE), hylo_ce_weight=0.5, seq_length=96) | flags
    done = helpers.train(*helpers.train_flags(world, "distill", folder, student="teacher", **flags))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return helpers.trained_weights(folder)


@pytest.fixture(scope="module")
def trained(world, tmp_path_factory):
    folder = tmp_path_factory.mktemp("control") / "run"
    return folder, control(world, folder)


def test_every_weight_is_trained_at_the_rate_of_copied_ones(world, trained, tmp_path):
    before = helpers.trained_weights(world["teacher"])
    assert before.keys() == trained[1].keys()
    assert not [name for name, tensor in before.items() if torch.equal(tensor, trained[1][name])]
    tiny.same_bits(control(world, tmp_path / "still", hylo_copied_lr_mult=0.0), before)


def test_its_export_says_what_the_stage_has_changed(world, trained, tmp_path, process_groups):
    from transformers import AutoModelForCausalLM

    from hylo_megatron.layers.load import load_model

    arch = megatron_to_hf.convert(trained[0], tmp_path / "hf")
    assert arch == Architecture.load(trained[0]) and arch.rope_parameters["rope_theta"] == 54321.0
    assert read_architecture(tmp_path / "hf").rope_parameters == arch.rope_parameters
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", dtype=torch.float32)
    own, _ = load_model(trained[0])
    tokens, positions = tiny.tokens(2, 40), torch.arange(40).expand(2, 40)
    with torch.no_grad():
        want = own(tokens, positions, None)[..., : arch.vocab_size]
        torch.testing.assert_close(model(tokens).logits, want, rtol=1e-4, atol=1e-4)
        base = AutoModelForCausalLM.from_pretrained(world["teacher-hf"]) if "teacher-hf" in world else None
    assert base is None or base.config.rope_parameters != model.config.rope_parameters


@pytest.mark.parametrize("changes", [
    {}, ROPE, {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
], ids=["none", "theta", "yarn"])  # fmt: skip
def test_config_json_is_read_as_it_was_meant(world, tmp_path, changes):
    arch = Architecture.load(world["teacher"])
    kept = {"rope_theta": 1e4} if "rope_type" in changes else arch.rope_parameters
    arch = replace(arch, rope_parameters=kept | changes, max_position_embeddings=512)
    base = tmp_path / "hf"
    base.mkdir()
    config = json.loads((world["teacher"] / "hf" / "config.json").read_text())
    theta = config.pop("rope_parameters")["rope_theta"]
    (base / "config.json").write_text(json.dumps(config | {"rope_theta": theta}))  # an older spelling
    out = tmp_path / "out"
    out.mkdir()
    megatron_to_hf._write_config(arch, tmp_path, out, torch.bfloat16)
    found = read_architecture(out)
    assert found.rope_parameters == arch.rope_parameters and found.max_position_embeddings == 512
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("student, stage, flags, words", [
    ("student", "distill", {}, "is a hybrid: --hylo-control trains a Transformer"),
    ("teacher", "ild", {}, "--hylo-stage ild has nothing to align in a Transformer"),
    ("teacher", "distill", dict(hylo_train="mixers"), "a Transformer has no new mixers to train"),
    ("teacher", "distill", dict(hylo_initial_states="carried"), "a Transformer has no linear blocks"),
])  # fmt: skip
def test_what_a_control_cannot_be(world, student, stage, flags, words):
    argv = list(map(str, helpers.train_flags(world, stage, "x", student=student, hylo_control=True, **flags)))
    with pytest.raises(HyLoError, match=words):
        command_line.check_control(command_line.user_flags(argv), Architecture.load(world[student]))


def test_a_recipe_has_its_control(world):
    recipe = toy_recipe()
    found = recipe.as_control()
    assert [stage.name for stage in found.stages] == [stage.name for stage in recipe.stages[1:]]
    assert found.to_dict()["control"]
    late = replace(recipe.stages[-1], train="mixers", initial_states="carried", mla_rope=False, log_scale="600")
    for each in (replace(recipe, stages=(late,)), smollm2_cpu()):
        for stage in each.as_control().stages:
            known = command_line.user_flags(["--hylo-control", *stage.flags()])
            command_line.check_control(known, Architecture.load(world["teacher"]))
            assert (known.hylo_mla_rope, known.hylo_log_scale) == (None, None)
    assert "control" not in recipe.to_dict()


@pytest.mark.slow
def test_the_runner_trains_a_control(world, tmp_path):
    recipe = toy_recipe().as_control()
    stage = replace(recipe.stages[0], mix=(), steps=2, seq_length=64)
    recipe = replace(recipe, stages=(stage,))
    model = tiny.save_model(tiny.teacher_model("llama"), tmp_path / "hf")
    out = tmp_path / "out"
    Run(recipe, out, Processes.found(), Source(model, (world["data"],))).execute()
    assert not (out / "student").exists() and read_architecture(out / f"hf-{stage.name}").rope_parameters
    before, after = (CheckpointReader(out / name)["decoder.final_norm.weight"] for name in ("teacher", stage.name))
    assert not torch.equal(before, after)
    # a stage that has diverged is not taken for done
    (out / stage.name / "diverged.json").write_text(json.dumps({"iteration": 2, "why": "step 2: loss nan"}))
    with pytest.raises(HyLoError, match="distill-2k diverged: step 2: loss nan. Run with a lower lr"):
        Run(recipe, out, Processes.found(), Source(model, (world["data"],))).execute()
