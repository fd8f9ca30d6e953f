"""A student with windows beside its mixers: initialised, trained, and exported."""

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402

from hylo_megatron.config import Plan  # noqa: E402
from hylo_megatron.convert import megatron_to_hf  # noqa: E402
from hylo_megatron.init.upcycle import upcycle  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    world = helpers.make_world(tmp_path_factory.mktemp("world"))
    world["window"] = world["student"].with_name("window")
    upcycle(
        world["teacher"], world["window"], Plan.parse(4, "0,3", "gdn"), tokens_BS=tiny.tokens(4, helpers.SEQ),
        log=str, window=tiny.WINDOWS,
    )  # fmt: skip
    return world


def changed(before, after) -> set[str]:
    """Return the last parts of the names of windows' weights that differ, in all layers, and of a linear block's
    projection.
    """
    old, new = helpers.trained_weights(before), helpers.trained_weights(after)
    assert old.keys() == new.keys()
    watched = [name for name in old if ".window." in name or name.endswith("self_attention.out_proj.weight")]
    assert len(watched) == 2 * 4 + 2 * 3
    equal = {name: torch.equal(old[name].float(), new[name].float()) for name in watched}
    found = {same: {name.split(".", 4)[-1] for name in watched if equal[name] == same} for same in (True, False)}
    assert not found[True] & found[False]
    return found[False]


def test_layerwise_stages_train_gates_and_linear_blocks_only(world, tmp_path):
    """The copied weights follow in stages that train everything; the result loads in transformers."""
    from hylo_megatron.hf import HyLoForCausalLM

    done = helpers.train(*helpers.train_flags(world, "ild", tmp_path / "ild", student="window"))
    assert done.returncode == 0, done.stderr[-3000:]
    assert changed(world["window"], tmp_path / "ild") == {"out_proj.weight", "window.gate_proj.weight"}
    done = helpers.train(*helpers.train_flags(world, "distill", tmp_path / "all", student=tmp_path / "ild"))
    assert done.returncode == 0, done.stderr[-3000:]
    copied = {"window.linear_qkv.weight", "window.linear_proj.weight"}
    assert changed(tmp_path / "ild", tmp_path / "all") == {"out_proj.weight", "window.gate_proj.weight", *copied}
    megatron_to_hf.convert(tmp_path / "all", tmp_path / "hf")
    model = HyLoForCausalLM.from_pretrained(tmp_path / "hf")
    assert model.config.window == tiny.WINDOWS and model(tiny.tokens()).logits.isfinite().all()


@pytest.mark.parametrize("shape, plan, beside", [
    ("llama", "none", {}), ("qwen2", "none", {}), ("qwen3", "none", {}), ("qwen3", "0,2", {"mla": True}),
])  # fmt: skip
def test_a_window_as_wide_as_the_text_is_the_base_models_attention(tmp_path, shape, plan, beside):
    """Then nothing is left over for the mixers, and the student starts as its teacher."""
    from hylo_megatron.convert import hf_to_megatron
    from hylo_megatron.hf import HyLoForCausalLM

    teacher = tiny.teacher_model(shape, common=1.0, **({"head_dim": 16} if shape == "qwen3" else {}))
    hf_to_megatron.convert(tiny.save_model(teacher, tmp_path / "hf"), tmp_path / "teacher", check=False)
    errors = {}
    sizes = {"wide": {"size": 32, "sinks": 0} | beside, "narrow": {"size": 4, "sinks": 1} | beside, "none": None}
    for name, window in sizes.items():
        report = upcycle(
            tmp_path / "teacher", tmp_path / name, Plan.parse(4, plan, "gdn"), tokens_BS=tiny.tokens(8), log=str,
            window=window,
        )  # fmt: skip
        errors[name] = max(entry["error"] for entry in report["layers"])
    assert errors["wide"] < 1e-4 and errors["narrow"] < errors["none"]
    megatron_to_hf.convert(tmp_path / "wide", tmp_path / "wide-hf")
    student = HyLoForCausalLM.from_pretrained(tmp_path / "wide-hf").eval()
    with torch.no_grad():
        torch.testing.assert_close(student(tiny.tokens()).logits, teacher(tiny.tokens()).logits, rtol=1e-3, atol=1e-3)
