"""Linear blocks that start from the base model's attention: fitted beats copied, and copies are exact."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("transformers")
from helpers import tiny
from helpers.bases import RUNS, error, initialise, output, student

from hylo_megatron.config import GDNGeometry
from hylo_megatron.errors import HyLoError
from hylo_megatron.init.linear_algebra import relative_error
from hylo_megatron.mixers import initialise as shared
from hylo_megatron.mixers.initialise import (
    ATTENTION,
    DATA,
    OPEN_GATE,
    OPEN_SILU,
    OPEN_SLOPE,
    choose_heads,
)
from hylo_megatron.mixers.kda.geometry import KDAGeometry


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
