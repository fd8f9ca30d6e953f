"""Initialisation from the base model: exact where it says so, calibrated beats copied, the rest untouched."""

import errno
import json
import math
import re
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
from helpers import tiny  # noqa: E402

from hylo_megatron.config import Architecture, GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry  # noqa: E402
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.init import upcycle  # noqa: E402
from hylo_megatron.init.calibration import calibration_tokens  # noqa: E402
from hylo_megatron.init.linear_algebra import relative_error, ridge_corrections  # noqa: E402
from hylo_megatron.init.mixer_forward import MixerRunner  # noqa: E402
from hylo_megatron.init.teacher import BaseModel  # noqa: E402
from hylo_megatron.init.window import window_beside  # noqa: E402
from hylo_megatron.kernels.rope import rope_frequencies  # noqa: E402
from hylo_megatron.mixers import MIXERS  # noqa: E402
from hylo_megatron.mixers import initialise as shared  # noqa: E402
from hylo_megatron.mixers.initialise import (  # noqa: E402
    ATTENTION,
    DATA,
    OPEN_GATE,
    OPEN_SILU,
    OPEN_SLOPE,
    choose_heads,
    constant_direction,
    linearised_qkv,
)
from hylo_megatron.mixers.kda.geometry import KDAGeometry  # noqa: E402
from hylo_megatron.mixers.mla import initialise as mla  # noqa: E402

CPU = torch.device("cpu")
TOKENS, RUNS = tiny.tokens(4, 96), tiny.runs()
MQA = dict(num_key_value_heads=1)


class Bases:
    """Converted tiny teachers, made once each."""

    def __init__(self, folder):
        self.folder, self.made = folder, {}

    def model(self, shape="llama", dtype=torch.float32, **changes):
        """``(transformers model, checkpoint folder)``."""
        key = repr((shape, dtype, changes))
        if key not in self.made:
            model, out = tiny.teacher_model(shape, dtype, **changes), self.folder / str(len(self.made))
            hf_to_megatron.convert(tiny.save_model(model, out / "hf"), out / "ckpt")
            self.made[key] = model, out / "ckpt"
        return self.made[key]

    def layer(self, shape="llama", index=1, tokens=TOKENS, **changes):
        """``(an attention layer on TOKENS, the base)``."""
        base = BaseModel(self.model(shape, **changes)[1], CPU)
        return next(layer for layer in base.layers(tokens) if layer.index == index), base


@pytest.fixture(scope="module")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("bases"))


def student(base, kind="mla", **mla_geometry) -> Architecture:
    """``base`` with one kind of mixer; heads like the base model's except for what is given."""
    dim, heads = base.arch.head_dim, base.arch.num_attention_heads
    sizes = dict(kv_lora_rank=256, qk_nope_head_dim=dim, qk_rope_head_dim=dim, v_head_dim=dim) | mla_geometry
    geometry = Geometry(
        MLAGeometry(**sizes),
        GDNGeometry(heads, 2 * heads, dim, dim),
        Mamba2Geometry(heads, dim, dim, heads),
        KDAGeometry(2 * heads, dim),
    )
    return replace(base.arch, plan=(kind,) * base.arch.num_layers, geometry=geometry)


def initialise(kind: str):
    return MIXERS[kind].part("initialise")


def output(layer, arch, weights) -> torch.Tensor:
    weights = {key: tensor.float() for key, tensor in weights.items()}
    runner = MixerRunner(arch, layer.index, CPU)
    runner.load(weights)
    return runner.features(layer.inputs_BSD) @ weights[initialise(arch.plan[layer.index]).OUTPUT_PROJECTION].T


def error(layer, arch, weights) -> float:
    return relative_error(output(layer, arch, weights), layer.output_BSD)


def data_error(layer, base, arch, source=None) -> float:
    """Error of MLA's calibrated start; ``source``: the architecture it is told."""
    return error(layer, arch, mla.calibrated(layer, source or arch, base.frequencies))


# ---- the base model, layer by layer ----


@pytest.mark.parametrize("shape", tiny.SHAPES)
def test_activations_are_those_of_transformers(bases, shape):
    model, checkpoint = bases.model(shape)
    seen = {}
    hooks = [
        layer.self_attn.o_proj.register_forward_hook(lambda _, args, out, i=i: seen.update({i: (args[0], out)}))
        for i, layer in enumerate(model.model.layers)
    ]
    norms = [
        layer.register_forward_hook(lambda _, args, out, i=i: seen.update({f"x{i}": (args[0], out)}))
        for i, layer in enumerate(model.model.layers)
    ]
    with torch.no_grad():
        model(TOKENS)
    for hook in hooks + norms:
        hook.remove()
    for layer in BaseModel(checkpoint, CPU).layers(TOKENS):
        heads, out = seen[layer.index]
        before, after = seen[f"x{layer.index}"]
        torch.testing.assert_close(layer.heads_BSHK.flatten(2), heads, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(layer.output_BSD, out, rtol=1e-4, atol=1e-5)
        normed = model.model.layers[layer.index].input_layernorm(before)
        torch.testing.assert_close(layer.inputs_BSD, normed, rtol=1e-4, atol=1e-5)
        assert layer.update_norm == pytest.approx((after - before).norm(dim=-1).mean().item(), rel=1e-4)


# ---- MLA from data ----


@pytest.mark.parametrize("shape", ["llama", "qwen3"])
@pytest.mark.parametrize("nope", [0, 8])
def test_data_init_is_exact_with_one_key_value_head(bases, shape, nope):
    """One key-value head, rope dims of the whole head, a latent that holds the values. No norms or biases between."""
    layer, base = bases.layer(shape, model_type="llama", **MQA)
    arch = student(base, qk_nope_head_dim=nope, kv_lora_rank=nope + base.arch.head_dim)
    assert data_error(layer, base, arch) < 1e-4
    narrow = replace(arch, geometry=student(base, qk_nope_head_dim=nope, kv_lora_rank=8).geometry)
    assert data_error(layer, base, narrow) > 1e-2  # the latent is what held the rest


def test_queries_of_low_rank(bases):
    layer, base = bases.layer(**MQA)
    errors = [data_error(layer, base, student(base, q_lora_rank=rank)) for rank in (8, 24, 64)]
    assert errors[0] > errors[1] > 0.01
    assert errors[2] < 1e-4  # as many as the hidden state has


@pytest.mark.parametrize("rope", [16, 8])
@pytest.mark.parametrize("rank", [96, 24])
@pytest.mark.parametrize("groups", [2, 4])
def test_data_init_beats_svd_with_several_groups(bases, groups, rank, rope):
    layer, base = bases.layer(num_key_value_heads=groups)
    arch = student(base, kv_lora_rank=rank, qk_rope_head_dim=rope, qk_nope_head_dim=16)
    calibrated, plain = data_error(layer, base, arch), error(layer, arch, mla.from_rows(layer, arch))
    assert calibrated < 0.9 * plain, (calibrated, plain)


def test_the_shared_rope_key_is_the_best_of_its_kind(bases):
    """It leaves less of the keys over than the head average does, and no more than any single group's key."""
    layer, base = bases.layer(num_key_value_heads=4)
    q, k, _ = (w.double() for w in linearised_qkv(layer, base.arch))
    x = layer.inputs_BSD.flatten(0, 1).double()
    cov, pairs = x.T @ x / len(x), torch.arange(8)
    _, shared, remainder = mla.shared_rope_key(torch.ones_like(q), k, cov, pairs)  # queries that weigh nothing

    def left_over(key_PD):
        """Energy that the best complex coefficient a group leaves over."""
        kc, sc = mla._complex(k), mla._complex(key_PD)
        dot = torch.einsum("gpd,de,pe->gp", kc, cov.to(kc.dtype), sc.conj())
        power = torch.einsum("pd,de,pe->p", sc, cov.to(kc.dtype), sc.conj())
        total = torch.einsum("gpd,de,gpe->gp", kc, cov.to(kc.dtype), kc.conj())
        return (total - dot.abs().square() / power).real.sum().item()

    best = left_over(shared)
    energy = torch.einsum("gpd,de,gpe->", remainder, cov.to(remainder.dtype), remainder.conj()).real.item()
    assert best == pytest.approx(energy, rel=1e-6)
    assert best < left_over(k.mean(0))
    assert all(best <= left_over(key) for key in k)


def test_position_sensitivity_grows_with_frequency_and_reach():
    frequencies = 1e4 ** (-torch.arange(8) / 8)
    value = mla.position_sensitivity(frequencies)
    assert (value[:-1] > value[1:]).all()
    assert (mla.position_sensitivity(frequencies, 4096) >= value)[4:].all()
    assert mla.position_sensitivity(torch.zeros(1)).item() == 0
    small = mla.position_sensitivity(torch.tensor([1e-7, 2e-7]))
    assert small[1] / small[0] == pytest.approx(4, rel=1e-3)  # |1 - exp(i f t)|² is (f t)² there


# ---- MLA from a truncated SVD ----


@pytest.mark.parametrize("q_lora_rank", [None, 64])
def test_svd_init_is_exact_when_every_pair_is_a_rope_pair(bases, q_lora_rank):
    layer, base = bases.layer(**MQA)
    arch = student(base, qk_nope_head_dim=0, kv_lora_rank=64, q_lora_rank=q_lora_rank)
    assert error(layer, arch, mla.from_rows(layer, arch)) < 1e-4


@pytest.mark.parametrize("rope", [4, 8])
def test_svd_init_keeps_rotary_pairs_whole(bases, rope):
    """Full rank, nope + rope = head dim, one key-value head: the base's attention with some pairs left unrotated.

    Those that rotate are evenly spread, so that their frequencies are those of a head of ``rope`` dimensions.
    """
    layer, base = bases.layer(rope_parameters=tiny.DEFAULT, **MQA)
    dim = base.arch.head_dim
    arch = student(base, qk_nope_head_dim=dim - rope, qk_rope_head_dim=rope)
    rotated = torch.arange(0, dim // 2, dim // rope)
    frequencies = torch.zeros(dim // 2)
    frequencies[rotated] = base.frequencies[rotated]
    torch.testing.assert_close(frequencies[rotated], rope_frequencies(tiny.DEFAULT, rope, 256)[0])
    base.frequencies = frequencies
    heads = base.attention(layer.inputs_BSD, layer.weights)
    want = F.linear(heads.flatten(2), layer["self_attn.o_proj.weight"])
    got = output(layer, arch, mla.from_rows(layer, arch))
    assert relative_error(got, want) < 1e-4
    assert relative_error(want, layer.output_BSD) > 1e-2  # what leaving pairs unrotated costs


def test_rope_pairs_fit_every_scaling_that_goes_by_wavelength():
    for rope in (tiny.DEFAULT, tiny.LLAMA3, tiny.LINEAR):
        arch = tiny.hybrid(rope_parameters=rope)
        whole, part = rope_frequencies(rope, 16, 256)[0], rope_frequencies(rope, 8, 256)[0]
        torch.testing.assert_close(whole[mla.rope_pairs(arch)], part)
    with pytest.raises(HyLoError, match="qk_rope_head_dim 8 must divide the head dimension 12"):
        mla.rope_pairs(tiny.hybrid(head_dim=12))


@pytest.mark.parametrize("tokens", [TOKENS, None], ids=["data", "no data"])
def test_norms_that_mla_keeps_are_applied_once(bases, tokens):
    """Qwen3's per-head norms in the published form: exact where plain MLA is."""
    layer, base = bases.layer("qwen3", tokens=tokens, **MQA)
    arch = replace(student(base, qk_nope_head_dim=0, kv_lora_rank=64), mla_qk_norm=True)
    weights = upcycle.initial_mixer(layer, arch, "svd", base.frequencies, None)
    assert error(bases.layer("qwen3", **MQA)[0], arch, weights) < 1e-4


# ---- biases and per-head norms ----


@pytest.mark.parametrize("shape, field", [("qwen2", "attention_bias"), ("qwen3", "qk_norm")])
def test_biases_and_norms_are_better_approximated_than_ignored(bases, shape, field):
    layer, base = bases.layer(shape, **MQA)
    arch = student(base)
    with_it, without = data_error(layer, base, arch), data_error(layer, base, arch, replace(arch, **{field: False}))
    assert with_it < 0.9 * without, (with_it, without)
    x = layer.inputs_BSD
    for name, heads, got in zip("qk", (4, 1), linearised_qkv(layer, base.arch), strict=False):
        want = F.linear(x, layer[f"self_attn.{name}_proj.weight"], layer[f"self_attn.{name}_proj.bias"])
        want = want.unflatten(-1, (heads, -1))
        if base.arch.qk_norm:
            want = want * torch.rsqrt(want.square().mean(-1, keepdim=True)) * layer[f"self_attn.{name}_norm.weight"]
        plain = F.linear(x, layer[f"self_attn.{name}_proj.weight"]).view_as(want)
        assert relative_error(torch.einsum("bsd,hkd->bshk", x, got), want) < 0.9 * relative_error(plain, want)


def test_constant_direction_closed_form():
    """Orthogonal rows: covariance 1, mean 1 / sqrt(D), so the solution is the mean over 1 + ridge."""
    dims = 16
    got = constant_direction(math.sqrt(dims) * torch.eye(dims), ridge=0.25)
    torch.testing.assert_close(got, torch.full((dims,), dims**-0.5 / 1.25))
    x = torch.randn(4000, dims, generator=torch.Generator().manual_seed(0))
    x[:, 3] = 2.0  # a feature that is always on
    assert (x @ constant_direction(x) - 1).abs().max() < 0.2


def test_ridge_correction_closed_form():
    """Orthogonal features: what the weight leaves over shrinks by 1 / (1 + ridge)."""
    generator = torch.Generator().manual_seed(0)
    features = 3 * torch.linalg.qr(torch.randn(64, 8, generator=generator)).Q
    old, true = torch.randn(5, 8, generator=generator), torch.randn(5, 8, generator=generator)
    half, full = ridge_corrections(features, features @ true.T, old, (0.5, 1.0))
    torch.testing.assert_close(half, old + (true - old) / 1.5, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(full, old + (true - old) / 2, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(next(ridge_corrections(features, features @ old.T, old, (0.02,))), old)
    assert relative_error(torch.tensor([[3.0, 4.0]]), torch.tensor([[0.0, 4.0]])) == pytest.approx(0.75)


# ---- linear blocks ----


@pytest.mark.parametrize("shape", ["llama", "qwen2", "qwen3", "smollm2"])
@pytest.mark.parametrize("kind", ["gdn", "mamba2", "kda"])
def test_calibrated_linear_blocks_beat_the_row_copy(bases, kind, shape):
    layer, base = bases.layer(shape, tokens=RUNS, common=0.1)
    arch, generator = student(base, kind), torch.Generator().manual_seed(0)
    calibrated = error(layer, arch, initialise(kind).calibrated(layer, arch, base.frequencies))
    copied = error(layer, arch, initialise(kind).from_rows(layer, arch, generator))
    assert calibrated < 0.8 * copied, (calibrated, copied)
    assert calibrated < 0.85  # zeros give 1


@pytest.mark.parametrize("kind", ["gdn", "kda"])
def test_the_start_from_attention_is_closer(bases, kind):
    """Heads whose size depends on the token, as that of a head which often attends to the first token only."""
    layer, base = bases.layer(tokens=tiny.runs(rows=32), common=1.0)
    direction = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
    size = layer.inputs_BSD @ direction
    size = (1 + 0.5 * (size - size.mean((0, 1))) / size.std((0, 1))).clamp_min(0)
    heads = layer.heads_BSHK * size[..., None]
    output = F.linear(heads.flatten(2), layer["self_attn.o_proj.weight"])
    layer = replace(layer, heads_BSHK=heads, output_BSD=output)
    arch, block = student(base, kind), initialise(kind)
    seen, held = layer.first(24), replace(layer, inputs_BSD=layer.inputs_BSD[24:], output_BSD=layer.output_BSD[24:])
    errors = [error(held, arch, block.calibrated(seen, arch, base.frequencies, c)) for c in (DATA, ATTENTION)]
    assert errors[1] < 0.8 * errors[0], errors


def test_gates_follow_the_size_of_heads(bases):
    """The sizes of heads are a linear function of the hidden state: the fit finds it, and both gates apply it."""
    generator = torch.Generator().manual_seed(0)
    x, true = torch.randn(3, 400, 8, generator=generator), 0.1 * torch.randn(2, 8, generator=generator)
    outputs = torch.randn(3, 400, 2, 1, 5, generator=generator)
    o = outputs[:, :, :, 0] * torch.rsqrt(outputs[:, :, :, 0].square().mean(-1, keepdim=True))
    factor = torch.tensor([0.7, -2.0])
    target = o * (factor * (1 + x @ true.T))[..., None]
    found = shared._size(x, outputs.split(1), target, factor, torch.zeros(8), eps=0.0)
    torch.testing.assert_close(found, true, rtol=0.15, atol=0.01)
    x = x[:2].flatten(0, 1).double()
    sign = torch.tensor([1.0, -1.0]).repeat_interleave(400)[:, None]  # what the first row shows is wrong in the second
    found = shared._ridge_by_head(x, x @ true.T.double() * torch.cat([sign, sign.abs()], 1), rows=2)
    assert not found[0].any() and found[1].any()

    layer, base = bases.layer(tokens=RUNS, common=1.0)
    inputs, dim = layer.inputs_BSD, base.arch.head_dim
    gdn, kda = (student(base, kind) for kind in ("gdn", "kda"))
    heads = initialise("gdn").heads_of(layer, gdn, base.frequencies, ATTENTION)
    assert heads.size.abs().max() > 0 and len(heads.beta.unique()) > 1
    size = (inputs @ heads.size.T).repeat_interleave(2, -1)
    weights = initialise("gdn").calibrated(layer, gdn, base.frequencies, ATTENTION)
    gate = F.linear(inputs, weights["mixer.g_proj.weight"]).unflatten(-1, (-1, dim))
    one = (inputs @ heads.one)[..., None, None]
    torch.testing.assert_close(gate, (OPEN_GATE * one + OPEN_SILU / OPEN_SLOPE * size[..., None]).expand_as(gate))
    z = torch.tensor(OPEN_GATE, requires_grad=True)
    F.silu(z).backward()
    assert z.grad.item() == pytest.approx(OPEN_SLOPE, abs=1e-4)
    weights = initialise("kda").calibrated(layer, kda, base.frequencies, ATTENTION)
    gate = F.linear(F.linear(inputs, weights["mixer.g_a_proj.weight"]), weights["mixer.g_b_proj.weight"])
    torch.testing.assert_close(gate.unflatten(-1, (-1, dim)), (2 * size[..., None]).expand(*size.shape, dim))


def test_betas_are_what_the_heads_chose(bases):
    layer, base = bases.layer(tokens=RUNS, common=1.0)
    arch = student(base, "gdn")
    for choices in (DATA, ATTENTION):
        heads = initialise("gdn").heads_of(layer, arch, base.frequencies, choices)
        weights = initialise("gdn").weights_of(heads, arch)
        assert set(heads.beta.tolist()) <= set(torch.tensor(choices.betas).tolist())
        logits = F.linear(layer.inputs_BSD, weights["mixer.b_proj.weight"])
        want = heads.beta.logit().repeat_interleave(2) * (layer.inputs_BSD @ heads.one)[..., None]
        torch.testing.assert_close(logits, want)
    assert not weights["mixer.a_proj.weight"].any()


def test_linear_blocks_that_rotate_start_from_decays_that_suit_the_rotation(bases):
    """A start chosen without the rotation, run with it, is no better; both kinds start alike."""
    layer, base = bases.layer(tokens=RUNS, common=1.0)
    outs = {}
    for kind in ("gdn", "kda"):
        plain, turned = student(base, kind), replace(student(base, kind), linear_rope=True)
        chosen, blind = (initialise(kind).calibrated(layer, arch, base.frequencies) for arch in (turned, plain))
        assert any(not torch.equal(chosen[name], blind[name]) for name in chosen)
        assert error(layer, turned, chosen) <= error(layer, turned, blind)
        outs[kind] = output(layer, turned, chosen)
        assert relative_error(output(layer, plain, chosen), outs[kind]) > 1e-2
    assert relative_error(outs["kda"], outs["gdn"]) < 5e-3


def test_copied_rows_are_the_reference_ones(bases):
    """GDN: overlapping rows of Q, K, V and columns of O. Mamba-2: x from V, B from K, C from Q, out from O."""
    layer, base = bases.layer()
    w, arch, generator = layer.weights, student(base, "gdn"), torch.Generator()
    k, v = (w[f"self_attn.{n}_proj.weight"].view(2, 16, 64).repeat_interleave(2, 0).flatten(0, 1) for n in "kv")
    q, o = w["self_attn.q_proj.weight"], w["self_attn.o_proj.weight"]
    wide = replace(arch.geometry, gdn=GDNGeometry(2, 2, 24, 48))
    gdn = initialise("gdn").from_rows(layer, replace(arch, geometry=wide), generator)
    assert torch.equal(gdn["mixer.q_proj.weight"], q[:48]) and torch.equal(gdn["mixer.k_proj.weight"], k[:48])
    assert torch.equal(gdn["mixer.v_proj.weight"], torch.cat([v, v.new_zeros(32, 64)]))
    assert torch.equal(gdn["mixer.o_proj.weight"], torch.cat([o, o.new_zeros(64, 32)], 1))
    m2 = initialise("mamba2").from_rows(layer, student(base, "mamba2"), generator)
    assert torch.equal(m2["mixer.in_proj.weight"][64:256], torch.cat([v, k, q]))
    assert torch.equal(m2["mixer.out_proj.weight"], o)
    assert m2["mixer.A_log"].exp().min() >= 1 and m2["mixer.A_log"].exp().max() <= 16
    dt = F.softplus(m2["mixer.dt_bias"])
    assert dt.min() >= 1e-3 * (1 - 1e-3) and dt.max() <= 0.1 * (1 + 1e-3)


def test_kimi_delta_attention_starts_as_gated_deltanet(bases):
    layer, base = bases.layer(tokens=RUNS, common=1.0)
    outs, starts = {}, {}
    for kind in ("gdn", "kda"):
        arch = student(base, kind)
        starts[kind] = initialise(kind).calibrated(layer, arch, base.frequencies)
        outs[kind] = output(layer, arch, starts[kind])
    assert relative_error(outs["kda"], outs["gdn"]) < 5e-3  # Gated DeltaNet's gate is nearly constant
    decay = F.softplus(starts["kda"]["mixer.dt_bias"]).unflatten(0, (-1, base.arch.head_dim))
    assert torch.equal(decay, decay[:, :1].expand_as(decay)) and len(decay.unique()) > 1


def test_copied_rows_of_kimi_delta_attention_begin_again(bases):
    layer, base = bases.layer()
    w, arch = layer.weights, replace(student(base, "kda"), geometry=replace(tiny.GEOMETRY, kda=KDAGeometry(6, 16)))
    found = initialise("kda").from_rows(layer, arch, torch.Generator())
    q, o = w["self_attn.q_proj.weight"], w["self_attn.o_proj.weight"]
    assert torch.equal(found["mixer.q_proj.weight"], torch.cat([q, q[:32]]))
    half = o[:, :32] / 2
    assert torch.equal(found["mixer.o_proj.weight"], torch.cat([half, o[:, 32:], half], 1))


@pytest.mark.parametrize("choices", [DATA, ATTENTION], ids=["data", "attention"])
@pytest.mark.parametrize("kind", ["gdn", "mamba2", "kda"])
def test_fitted_starts_refuse_heads_unlike_the_base(bases, kind, choices):
    layer, base = bases.layer()
    arch = replace(student(base, kind), geometry=tiny.GEOMETRY_Q_LORA)
    with pytest.raises(HyLoError, match=f"^--init {choices.name} for .*--geometry native.*--init svd"):
        initialise(kind).calibrated(layer, arch, base.frequencies, choices)


def test_fewer_heads_keep_those_that_matter(bases):
    layer, base = bases.layer()
    layer.heads_BSHK[:, :, 1] = 0
    layer.heads_BSHK[:, :, 3] *= 1e-3
    assert choose_heads(layer, base.arch, 2).tolist() == [0, 2]
    assert choose_heads(layer, base.arch, 6).tolist() == [0, 1, 2, 3, 0, 1]


# ---- a whole student ----

MIXED = {
    "gdn": ("mla", "gdn", "gdn", "mla"),
    "mamba2": ("mamba2", "mla", "mamba2", "mamba2"),
    "kda": ("mla", "kda", "mla", "kda"),
}


@pytest.mark.parametrize("how", upcycle.INITS)
@pytest.mark.parametrize("linear", MIXED)
def test_student_checkpoint(bases, tmp_path, linear, how):
    """bf16 teacher: what is not a mixer is copied bit for bit, decay parameters are fp32, errors are reported."""
    model, checkpoint = bases.model("llama", torch.bfloat16)
    plan, lines = MIXED[linear], []
    out = tmp_path / "student"
    report = upcycle.upcycle(checkpoint, out, plan, init=how, tokens_BS=TOKENS, log=lines.append)
    assert [path.name for path in tmp_path.iterdir()] == ["student"]
    megatron_to_hf.convert(out, tmp_path / "hf")
    teacher = {key: tensor for key, tensor in model.state_dict().items() if key != "lm_head.weight"}
    found = tiny.weights(tmp_path / "hf")
    is_mixer = {key: ".self_attn." in key or ".mixer." in key for key in found | teacher}
    tiny.same_bits(
        {key: tensor for key, tensor in found.items() if not is_mixer[key]},
        {key: tensor for key, tensor in teacher.items() if not is_mixer[key]},
    )
    decay = {key for key in found if key.endswith((".A_log", ".dt_bias", ".mixer.D"))}
    assert len(decay) == (3 if linear == "mamba2" else 2) * plan.count(linear)
    assert all((tensor.dtype == torch.float32) == (key in decay) for key, tensor in found.items())

    arch = Architecture.load(out)
    assert arch.plan == plan and arch.is_hybrid
    assert json.loads((out / upcycle.REPORT).read_text()) == report
    assert [(entry["layer"], entry["kind"]) for entry in report["layers"]] == list(enumerate(plan))
    assert arch.extra["ild_norms"] == [[e["output_norm"], e["update_norm"]] for e in report["layers"]]
    for layer, entry in zip(BaseModel(checkpoint, CPU).layers(TOKENS), report["layers"], strict=True):
        assert entry["output_norm"] == pytest.approx(layer.output_BSD.norm(dim=-1).mean().item())
        prefix = f"model.layers.{layer.index}."
        stored = {k.removeprefix(prefix): t for k, t in found.items() if k.startswith(prefix) and is_mixer[k]}
        held = replace(layer, inputs_BSD=layer.inputs_BSD[3:], output_BSD=layer.output_BSD[3:])
        assert error(held, arch, stored) == pytest.approx(entry["error"], abs=0.02)  # the stored ones are rounded
    assert len(lines) == 4 and all("relative error" in line for line in lines)
    assert (out / "hf" / "tokenizer.json").exists()


def test_ridge_is_kept_only_where_it_helps(bases, tmp_path):
    checkpoint = bases.model(common=0.1)[1]
    plain = upcycle.upcycle(checkpoint, tmp_path / "a", MIXED["gdn"], tokens_BS=RUNS, ridge=False, log=list)
    fitted = upcycle.upcycle(checkpoint, tmp_path / "b", MIXED["gdn"], tokens_BS=RUNS, log=list)
    for entry, before in zip(fitted["layers"], plain["layers"], strict=True):
        assert ("error_ridge" in entry) == (entry["kind"] == "gdn")
        assert "error_ridge" not in before
        if entry["kind"] == "gdn":
            assert entry["error_transferred"] == pytest.approx(before["error"])
            assert entry["error"] == min(entry["error_transferred"], entry["error_ridge"])
            assert entry["error"] < before["error"]
        else:
            assert entry["error"] == before["error"]


def test_attention_chooses_the_ridge_and_leaves_mla_as_it_is(bases, tmp_path):
    checkpoint, found = bases.model(common=0.1)[1], {}
    for how in ("data", "attention"):
        report = upcycle.upcycle(checkpoint, tmp_path / how, MIXED["gdn"], init=how, tokens_BS=RUNS, log=list)
        megatron_to_hf.convert(tmp_path / how, tmp_path / f"{how}.hf")
        found[how] = report["layers"], tiny.weights(tmp_path / f"{how}.hf")
        assert {entry["ridge"] for entry in report["layers"] if entry["kind"] == "gdn"} <= set(upcycle.RIDGES[how])
    (data, old), (attention, new) = found.values()
    tiny.same_bits(*({k: t for k, t in weights.items() if ".mixer." not in k} for weights in (old, new)))
    for before, after in zip(data, attention, strict=True):
        assert after["kind"] == "gdn" or after["error"] == before["error"]


def test_a_windows_gates_are_not_fitted_on_held_out_rows(bases):
    layer, base = bases.layer()
    arch = replace(student(base, "gdn"), window=tiny.WINDOW)

    def gates(row: int) -> torch.Tensor:
        changed = replace(layer, heads_BSHK=layer.heads_BSHK.clone())
        changed.heads_BSHK[row] *= -1
        return window_beside(base, changed, arch).weights["mixer.window.gate_proj.weight"]

    first, last = gates(0), gates(3)
    assert torch.equal(last, window_beside(base, layer, arch).weights["mixer.window.gate_proj.weight"])
    assert not torch.allclose(first, last)


def test_the_same_seed_gives_the_same_student(bases, tmp_path):
    checkpoint, found = bases.model()[1], []
    for number, seed in enumerate((1, 1, 2)):
        report = upcycle.upcycle(checkpoint, tmp_path / f"{number}", MIXED["gdn"], init="svd", seed=seed, log=list)
        assert "error" not in report["layers"][0]  # nothing to measure on
        megatron_to_hf.convert(tmp_path / f"{number}", tmp_path / f"{number}.hf")
        found.append(tiny.weights(tmp_path / f"{number}.hf"))
    tiny.same_bits(found[1], found[0])
    key = "model.layers.1.mixer.A_log"
    assert not torch.equal(found[2][key], found[0][key])
    assert upcycle.summary({"layers": [{"kind": "mla"}]}) == "not measured"


def test_what_upcycle_refuses(bases, tmp_path):
    checkpoint = bases.model()[1]

    def refused(words, *args, **kwargs):
        with pytest.raises(HyLoError, match=words):
            upcycle.upcycle(*args, tmp_path / "out", MIXED["gdn"], **kwargs)
        assert not [path for path in tmp_path.iterdir() if path.name.startswith("out")]

    refused("--calibration TEXT", checkpoint)
    refused("init 'svg': expected one of data, attention, svd", checkpoint, init="svg")
    refused("--init attention needs --calibration TEXT", checkpoint, init="attention")
    refused("no published dimensions", checkpoint, init="svd", geometry="published")
    tiny.write_hybrid(tmp_path / "hybrid", tiny.hybrid())
    refused("already a hybrid .2MLA2GDN.", tmp_path / "hybrid", init="svd")
    refused("hylo.json not found", tmp_path, init="svd")


def test_an_output_that_is_not_empty_is_refused_before_the_work(bases, tmp_path, monkeypatch):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes").write_text("mine")
    monkeypatch.setattr(upcycle, "initial_mixer", lambda *_: pytest.fail("worked for nothing"))
    with pytest.raises(HyLoError, match="exists and is not empty"):
        upcycle.upcycle(bases.model()[1], tmp_path / "out", MIXED["gdn"], init="svd", log=list)
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["notes", "out"]


# ---- the tool ----


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.jsonl"
    rows = [" ".join(f"w{(7 * i * j + j) % tiny.VOCAB}" for j in range(90)) for i in range(1, 9)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    return path


def tool(checkpoint, tmp_path, *more):
    argv = ["--teacher", str(checkpoint), "--out", str(tmp_path / "out"), "--mla-layers", "0,3", *map(str, more)]
    upcycle.main(argv)


def test_tool_with_calibration_text(bases, tmp_path, text, capsys):
    size = ("--calibration-tokens", 192, "--calibration-length", 64)
    tool(bases.model()[1], tmp_path, "--calibration", text, *size)
    printed = capsys.readouterr().out
    assert "relative error of the new mixers, mean: mla" in printed and "2MLA2GDN -> " in printed
    assert Architecture.load(tmp_path / "out").plan == ("mla", "gdn", "gdn", "mla")


@pytest.mark.parametrize(
    "more, words",
    [
        ([], "--init data needs --calibration"),
        (["--calibration", "nowhere.txt"], "nowhere.txt: no such file"),
        (["--calibration", "TEXT", "--calibration-tokens", 9999], "lower --calibration-tokens"),
        (["--init", "svd", "--mla-qk-norm"], "needs a base model with per-head norms"),
        (["--init", "svd", "--mla-layers", "9"], "lie in 0..3"),
    ],
)
def test_tool_refuses_in_one_line(bases, tmp_path, text, capsys, more, words):
    with pytest.raises(SystemExit) as caught:
        tool(bases.model()[1], tmp_path, *(text if word == "TEXT" else word for word in more))
    message = capsys.readouterr().err
    assert caught.value.code == 2 and words in message and message.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == ["text.jsonl"]


@pytest.mark.parametrize("name", ["save_tensors", "copy_companions"])
def test_a_full_disk(bases, tmp_path, monkeypatch, capsys, name):
    def no_space(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(upcycle, name, no_space)
    with pytest.raises(SystemExit) as caught:
        tool(bases.model()[1], tmp_path, "--init", "svd")
    assert caught.value.code == 2
    assert re.match(r"error: .*no space left.*free space", capsys.readouterr().err, re.IGNORECASE)
    assert not list(tmp_path.iterdir())


def test_calibration_tokens_come_from_everywhere_and_are_the_same_each_time(bases, tmp_path, text):
    folder = bases.model()[1] / "hf"
    rows = calibration_tokens(text, folder, 128, 32)
    assert rows.shape == (4, 32)
    assert rows.equal(calibration_tokens(text, folder, 128, 32))
    starts = [[int(w[1:]) for w in json.loads(line)["text"].split()[:32]] for line in text.read_text().splitlines()]
    assert rows[0].tolist() in starts[1:]  # a file sorted by source must not be calibrated on its first source alone
    assert rows.flatten()[32].item() == 2  # the end of a document, of which a stretch of one row is taken
    plain = tmp_path / "text.txt"
    plain.write_text(" ".join(f"w{i}" for i in range(64)))
    with pytest.raises(HyLoError, match="text.txt: holds 33 tokens, calibration needs 64"):
        calibration_tokens(plain, folder, 32, 32)
    plain.write_text(" ".join(f"w{i}" for i in range(90)) * 2)
    assert calibration_tokens(plain, folder, 64, 32).shape == (2, 32)
    text.write_text('{"text": "w1"}\nno json\n')
    with pytest.raises(HyLoError, match="text.jsonl:2: not valid JSON"):
        calibration_tokens(text, folder, 128, 32)
