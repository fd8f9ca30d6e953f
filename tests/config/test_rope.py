"""Rotary embeddings: lengths that stay where they are, and YaRN's attention factor from the folder to the export."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
from helpers import tiny  # noqa: E402
from transformers import AutoModelForCausalLM  # noqa: E402

import hylo_megatron.hf  # noqa: E402, F401  registers the model type
from hylo_megatron.config import Architecture, GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry  # noqa: E402  # noqa: E402
from hylo_megatron.config.rope import same_at_any_width  # noqa: E402
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf  # noqa: E402
from hylo_megatron.distill.arguments import run_architecture  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.init import upcycle  # noqa: E402
from hylo_megatron.init.linear_algebra import relative_error  # noqa: E402
from hylo_megatron.init.mixer_forward import MixerRunner  # noqa: E402
from hylo_megatron.init.teacher import BaseModel  # noqa: E402
from hylo_megatron.kernels.rope import rope_frequencies  # noqa: E402
from hylo_megatron.mixers.mla import initialise as mla  # noqa: E402

CPU, TOKENS = torch.device("cpu"), tiny.tokens(2, 64)
OPEN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}  # no original_max_position_embeddings
# A factor that shows, and a ramp whose ends are rounded.
STRONG = OPEN | {"factor": 40.0, "original_max_position_embeddings": 112}
ROPES = {"default": tiny.DEFAULT, "yarn": STRONG, "no rounding": STRONG | {"truncate": False, "attention_factor": 1.3}}


def at(folder, rope=None, length=256):
    arch = run_architecture(folder, rope, length)
    return rope_frequencies(arch.rope_parameters, arch.head_dim, arch.max_position_embeddings)[0]


def moves(folder, rope=None) -> bool:
    first = at(folder, rope)
    return any(not torch.equal(at(folder, rope, length), first) for length in (512, 4096))


def same_as(folder, rope) -> bool:
    return torch.equal(at(folder), rope_frequencies(rope, 16, 256)[0])


def test_frequencies_do_not_move_with_the_sequences(tmp_path):
    arch = tiny.hybrid(rope_parameters=OPEN)
    arch.save(tmp_path)  # as earlier versions wrote it
    assert Architecture.load(tmp_path).rope_parameters["original_max_position_embeddings"] == 256
    assert not moves(tmp_path)
    assert same_as(tmp_path, OPEN | {"original_max_position_embeddings": 256})
    for rope in (tiny.DEFAULT, tiny.LINEAR, tiny.LLAMA3, tiny.YARN):
        replace(arch, rope_parameters=rope).save(tmp_path)
        assert not moves(tmp_path) and same_as(tmp_path, rope)
        assert not moves(tmp_path, {"rope_type": "yarn", "factor": 8.0})
        assert not moves(tmp_path, {"rope_theta": 3e5})


def test_a_stage_on_longer_sequences_keeps_the_length_that_yarn_starts_from(tmp_path):
    """The next stage starts from what this one saves, whose maximum is the longer one."""
    tiny.hybrid(rope_parameters=OPEN).save(tmp_path)
    first = at(tmp_path)
    run_architecture(tmp_path, None, 1024).save(tmp_path)
    assert Architecture.load(tmp_path).max_position_embeddings == 1024
    assert torch.equal(at(tmp_path), first)


@pytest.mark.parametrize("rope, words", [
    ({"rope_type": "dynamic", "factor": 2.0}, "'dynamic' is not supported"), ({"rope_type": "yarn"}, "factor"),
    ({"rope_theta": 0}, "rope_theta"), ({"rope_theta": None}, "rope_theta"), ({"rope_theta": "1e4"}, "rope_theta"),
    ({"rope_type": "linear", "factor": True}, "factor"), ({"rope_type": ["yarn"]}, "not supported"),
    ([1], "the whole"),
    ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 0}, "original_max_position_embeddings"),
    ({"factor": 2.0}, "factor is not a field of rope_type 'default'"), ({"mscale_all": 1}, "mscale_all"),
    ({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 4.0, "high_freq_factor": 4.0}, "high_freq_factor"),
])  # fmt: skip
def test_a_rotary_embedding_that_is_not_known_is_refused_on_the_command_line(tmp_path, rope, words):
    tiny.hybrid().save(tmp_path)
    with pytest.raises(HyLoError) as caught:
        run_architecture(tmp_path, rope)
    assert words in str(caught.value) and "--hylo-rope" in str(caught.value) and "\n" not in str(caught.value)


def test_frequencies_that_are_no_numbers_are_refused():
    with pytest.raises(HyLoError, match="not finite"):
        rope_frequencies(STRONG | {"rope_theta": 1.0}, 16, 256)


@pytest.mark.parametrize("rope", [*ROPES.values(), tiny.YARN, STRONG | {"beta_fast": 4, "beta_slow": 0.5}], ids=str)
def test_a_part_of_a_head_turns_at_the_frequencies_of_the_whole(rope):
    whole, factor = rope_frequencies(rope, 64, 256)
    student = same_at_any_width(rope, 64)
    for width in (64, 32, 16, 8):
        part, same = rope_frequencies(student, width, 256)
        torch.testing.assert_close(part, whole[:: 64 // width], rtol=1e-5, atol=0)
        assert same == factor


# ---- the attention factor ----


class Base:
    def __init__(self, folder, shape="llama", **changes):
        self.model = tiny.teacher_model(shape, num_key_value_heads=1, **changes)
        source = tiny.save_model(self.model, folder / "hf")
        self.checkpoint = folder / "ckpt"
        hf_to_megatron.convert(source, self.checkpoint)
        self.read = BaseModel(self.checkpoint, CPU)

    def student(self, **sizes) -> Architecture:
        dim = self.read.arch.head_dim
        sizes = dict(kv_lora_rank=128, qk_nope_head_dim=0, qk_rope_head_dim=dim, v_head_dim=dim) | sizes
        geometry = Geometry(MLAGeometry(**sizes), GDNGeometry(2, 4, dim, dim), Mamba2Geometry(2, dim, dim, 2))
        return upcycle.student_architecture(self.read.arch, ("mla",) * self.read.arch.num_layers, geometry)


@pytest.fixture(scope="module", params=ROPES)
def base(request, tmp_path_factory):
    return Base(tmp_path_factory.mktemp(request.param), rope_parameters=ROPES[request.param])


def test_calibration_sees_the_attention_of_transformers(base):
    seen = []
    hooks = [x.self_attn.register_forward_hook(lambda *a: seen.append(a[2][0])) for x in base.model.model.layers]
    with torch.no_grad():
        base.model(TOKENS)
    for hook in hooks:
        hook.remove()
    for layer, want in zip(base.read.layers(TOKENS), seen, strict=True):
        assert relative_error(layer.output_BSD, want) < 1e-5


def exported(base, folder, geometry, init) -> torch.Tensor:
    """Logits of the student that upcycling makes, after its export."""
    plan = ("mla",) * base.read.arch.num_layers
    upcycle.upcycle(base.checkpoint, folder / "student", plan, init=init, geometry=geometry, tokens_BS=TOKENS,
                    log=lambda _: None)  # fmt: skip
    megatron_to_hf.convert(folder / "student", folder / "export")
    model = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32).eval()
    with torch.no_grad():
        return model(TOKENS).logits


@pytest.mark.parametrize("init", ["data", "svd"])
def test_a_student_that_can_be_exact_has_the_logits_of_its_base(base, tmp_path, init):
    """One key-value head, every pair rotary, a latent that holds the values: from the folder to the export."""
    geometry = base.student(q_lora_rank=None if init == "data" else 64).geometry
    with torch.no_grad():
        want = base.model(TOKENS).logits
    assert relative_error(exported(base, tmp_path, geometry, init), want) < 1e-4


@pytest.mark.parametrize("init, q_lora_rank", [("svd", None), ("svd", 64), ("data", None), ("data", 64)])
@pytest.mark.parametrize("rope, mla_rope", [(4, True), (8, True), (8, False)])
def test_the_part_without_positions_carries_the_factor_too(base, rope, mla_rope, init, q_lora_rank):
    """The base's attention with the pairs that are not rotary left unrotated is what a full-rank MLA computes."""
    arch = base.student(qk_nope_head_dim=16 - rope, qk_rope_head_dim=rope, q_lora_rank=q_lora_rank)
    arch, read = replace(arch, mla_rope=mla_rope), BaseModel(base.checkpoint, CPU)
    still = torch.ones(8, dtype=torch.bool)
    still[mla.rope_pairs(arch)] = not mla_rope
    read.frequencies[still] = 0.0
    layer = next(iter(read.layers(TOKENS)))  # its target is the attention with these pairs unrotated
    how = mla.from_rows if init == "svd" else lambda layer, arch: mla.calibrated(layer, arch, read.frequencies)
    weights = how(layer, arch)
    runner = MixerRunner(arch, 0, CPU)
    runner.load(weights)
    got = F.linear(runner.features(layer.inputs_BSD), weights["self_attn.o_proj.weight"].float())
    assert relative_error(got, layer.output_BSD) < 1e-4


def test_norms_that_mla_keeps_carry_the_factor(tmp_path):
    """Qwen3's norms take the size of the queries away, so that the factor stands in the norm's weight."""
    layers = [{}, {}]
    for found, rope in zip(
        layers, (STRONG | {"attention_factor": 1.0}, STRONG | {"attention_factor": 1.5}), strict=True
    ):
        base = Base(tmp_path / str(rope["attention_factor"]), "qwen3", rope_parameters=rope)
        arch = replace(base.student(qk_nope_head_dim=24, qk_rope_head_dim=8), mla_qk_norm=True)
        layer = next(iter(base.read.layers(None)))
        found |= upcycle.initial_mixer(layer, arch, "svd", base.read.frequencies, None)
    plain, scaled = (found["self_attn.q_norm.weight"] for found in layers)
    torch.testing.assert_close(scaled[:24], plain[:24] * 1.5**2)
    torch.testing.assert_close(scaled[24:], plain[24:])
    torch.testing.assert_close(*(found["self_attn.k_norm.weight"] for found in layers))
