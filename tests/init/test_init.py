"""Initialisation of MLA from the base model: exact where it says so, and calibrated beats copied."""

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
from helpers import tiny
from helpers.bases import CPU, TOKENS, error, output, student

from hylo_megatron.errors import HyLoError
from hylo_megatron.init import upcycle
from hylo_megatron.init.linear_algebra import relative_error, ridge_corrections
from hylo_megatron.init.teacher import BaseModel
from hylo_megatron.kernels.rope import rope_frequencies
from hylo_megatron.mixers.initialise import (
    constant_direction,
    linearised_qkv,
)
from hylo_megatron.mixers.mla import initialise as mla

MQA = dict(num_key_value_heads=1)


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
