"""The torch kernels against fla's naive code, transformers' Mamba-2, their own recurrences, and finite differences."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from helpers import tiny

from hylo_megatron import kernels
from hylo_megatron.config.layout import ParallelLayout, Work
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels.choose import TORCH
from hylo_megatron.kernels.self_test import LENGTH, RankShape, self_test

TOLERANCE = dict(atol=2e-6, rtol=2e-5)


def gdn_inputs(batch=2, length=150, key_heads=2, heads=4, key_dim=16, value_dim=24, decay=1.0, dtype=torch.float32):
    torch.manual_seed(0)
    q, k = (torch.randn(batch, length, key_heads, key_dim, dtype=dtype) for _ in "qk")
    v = torch.randn(batch, length, heads, value_dim, dtype=dtype)
    g = -decay * torch.rand(batch, length, heads, dtype=dtype)
    beta = torch.rand(batch, length, heads, dtype=dtype)
    return [x.requires_grad_() for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta)]


def ssd_inputs(batch=2, length=150, heads=4, head_dim=12, groups=2, state=16, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(batch, length, heads, head_dim, dtype=dtype)
    dt, A = torch.rand(batch, length, heads, dtype=dtype), -3 * torch.rand(heads, dtype=dtype)
    B, C = (torch.randn(batch, length, groups, state, dtype=dtype) for _ in "BC")
    return [t.requires_grad_() for t in (x, dt, A, B, C)]


def gradients(outputs, inputs):
    torch.manual_seed(1)
    return torch.autograd.grad(sum((o * torch.randn(o.shape).to(o)).sum() for o in outputs), inputs)


def assert_same(got, expected, **tolerance):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, **(tolerance or TOLERANCE))


@pytest.mark.parametrize("reference", ["naive_recurrent_gated_delta_rule", "naive_chunk_gated_delta_rule"])
@pytest.mark.parametrize("length", [1, 64, 150])
def test_gated_delta_rule_matches_fla(reference, length):
    naive = pytest.importorskip("fla.ops.gated_delta_rule.naive")
    inputs = gdn_inputs(length=length, heads=2)
    q, k, v, g, beta = inputs
    state = torch.randn(2, 2, 16, 24)
    kwargs = dict(initial_state=state, output_final_state=True)
    expected = getattr(naive, reference)(q, k, v, g=g, beta=beta, **kwargs)
    got = kernels.chunk_gated_delta_rule(*inputs, **kwargs)
    assert_same(got, expected)
    assert_same(gradients(got, inputs), gradients(expected, inputs), atol=2e-5, rtol=1e-4)
    assert_same(kernels.recurrent_gated_delta_rule(*inputs, **kwargs), expected)


@pytest.mark.parametrize("chunk_size", [16, 64, 128])
@pytest.mark.parametrize("length", [5, 130])
def test_gated_delta_chunks_match_steps_with_grouped_values(chunk_size, length):
    inputs = gdn_inputs(length=length, dtype=torch.float64)
    state = torch.randn(2, 4, 16, 24, dtype=torch.float64, requires_grad=True)
    kwargs = dict(initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True, scale=0.3)
    got = kernels.chunk_gated_delta_rule(*inputs, chunk_size=chunk_size, **kwargs)
    expected = kernels.recurrent_gated_delta_rule(*inputs, **kwargs)
    assert_same(got, expected, atol=1e-12, rtol=1e-10)
    assert_same(gradients(got, [*inputs, state]), gradients(expected, [*inputs, state]), atol=1e-11, rtol=1e-9)


def test_value_heads_share_key_heads_in_order():
    q, k, v, g, beta = gdn_inputs()
    wide = kernels.chunk_gated_delta_rule(q.repeat_interleave(2, 2), k.repeat_interleave(2, 2), v, g, beta)[0]
    assert_same([kernels.chunk_gated_delta_rule(q, k, v, g, beta)[0]], [wide])


def test_gated_delta_gradcheck():
    inputs = gdn_inputs(1, 7, 1, 2, 3, 2, dtype=torch.float64)
    state = torch.randn(1, 2, 3, 2, dtype=torch.float64, requires_grad=True)

    def run(*args):
        return kernels.chunk_gated_delta_rule(*args[:5], initial_state=args[5], output_final_state=True, chunk_size=4)

    assert torch.autograd.gradcheck(run, (*inputs, state))


def test_two_halves_equal_the_whole():
    inputs = gdn_inputs(length=101)
    whole = kernels.chunk_gated_delta_rule(*inputs, output_final_state=True)
    first, state = kernels.chunk_gated_delta_rule(*(x[:, :70] for x in inputs), output_final_state=True)
    second = kernels.chunk_gated_delta_rule(*(x[:, 70:] for x in inputs), initial_state=state, output_final_state=True)
    assert_same([torch.cat([first, second[0]], 1), second[1]], whole)
    inputs = ssd_inputs(length=101)
    whole = kernels.ssd_chunk_scan(*inputs, output_final_state=True)
    parts, state = [], None
    for span in (slice(0, 70), slice(70, None)):
        x, dt, A, B, C = (t if t.dim() == 1 else t[:, span] for t in inputs)
        part, state = kernels.ssd_chunk_scan(x, dt, A, B, C, initial_state=state, output_final_state=True)
        parts.append(part)
    assert_same([torch.cat(parts, 1), state], whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("decay", [-20.0, -1e4])
def test_strong_decay_is_finite_and_right(decay):
    q, k, v, g, beta = gdn_inputs(length=130)
    g = torch.where(torch.rand_like(g) < 0.7, decay, -0.01).requires_grad_()
    inputs = [q, k, v, g, beta]
    got, expected = kernels.chunk_gated_delta_rule(*inputs), kernels.recurrent_gated_delta_rule(*inputs)
    assert_same(got[:1], expected[:1], atol=1e-5, rtol=1e-4)
    slopes = gradients(got[:1], inputs)
    assert all(t.isfinite().all() for t in slopes)
    assert_same(slopes, gradients(expected[:1], inputs), atol=2e-5, rtol=1e-4)
    x, dt, A, B, C = ssd_inputs(length=130)
    inputs = [x, dt, (A * abs(decay)).detach().requires_grad_(), B, C]
    got = kernels.ssd_chunk_scan(*inputs)[0]
    assert_same([got], [kernels.recurrent_ssd(*inputs)[0]], atol=1e-5, rtol=1e-4)
    assert all(t.isfinite().all() for t in gradients([got], inputs))


def test_identical_keys_stay_accurate():
    """beta = 1, one key, no decay: the triangular system at its worst; powers of it would lose every digit."""
    q, k, v, g, beta = gdn_inputs(length=128)
    k, g, beta = k[:, :1].expand_as(k), torch.zeros_like(g), torch.ones_like(beta)
    got = kernels.chunk_gated_delta_rule(q, k, v, g, beta)[0]
    assert_same([got], [kernels.recurrent_gated_delta_rule(q, k, v, g, beta)[0]], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("length", [1, 64, 150])
def test_ssd_chunks_match_steps(length):
    inputs = ssd_inputs(length=length, dtype=torch.float64)
    D = torch.randn(4, dtype=torch.float64, requires_grad=True)
    state = torch.randn(2, 4, 12, 16, dtype=torch.float64, requires_grad=True)
    leaves = [*inputs, D, state]
    got = kernels.ssd_chunk_scan(*inputs, 64, D, state, True)
    expected = kernels.recurrent_ssd(*inputs, D, state, True)
    assert_same(got, expected, atol=1e-11, rtol=1e-10)
    assert_same(gradients(got, leaves), gradients(expected, leaves), atol=1e-10, rtol=1e-9)


def test_ssd_against_the_quadratic_form():
    """y_i = sum_j<=i C_i.B_j exp(A (dt_j+1 + .. + dt_i)) dt_j x_j, written out with no chunk and no state."""
    x, dt, A, B, C = ssd_inputs(length=90, dtype=torch.float64)
    B, C = B.repeat_interleave(2, 2), C.repeat_interleave(2, 2)
    cum = (dt * A).cumsum(1)
    decay = (cum[:, :, None] - cum[:, None]).exp() * torch.ones(90, 90).tril()[None, :, :, None]
    expected = torch.einsum("bihn,bjhn,bijh,bjh,bjhp->bihp", C, B, decay, dt, x)
    assert_same([kernels.ssd_chunk_scan(x, dt, A, B, C)[0]], [expected], atol=1e-10, rtol=1e-9)


def test_ssd_gradcheck():
    inputs = ssd_inputs(1, 6, 2, 2, 1, 3, torch.float64)
    assert torch.autograd.gradcheck(lambda *a: kernels.ssd_chunk_scan(*a, chunk_size=4)[0], inputs)


def mamba_ssm_reference(zxbcdt, weight, bias, dt_bias, A, D, heads, head_dim, groups):
    """mamba_split_conv1d_scan_ref of mamba_ssm, from its documentation: conv, selective scan, gate."""
    inner, state = heads * head_dim, (zxbcdt.shape[-1] - 2 * heads * head_dim - heads) // 2
    z, xbc, dt = zxbcdt.split([inner, inner + 2 * state, heads], -1)
    length = z.shape[1]
    xbc = F.conv1d(xbc.mT, weight[:, None], bias, padding=weight.shape[1] - 1, groups=len(weight))[..., :length]
    x, B, C = F.silu(xbc).mT.split([inner, state, state], -1)
    x, B, C = x.unflatten(-1, (heads, -1)), B.unflatten(-1, (groups, -1)), C.unflatten(-1, (groups, -1))
    y = kernels.recurrent_ssd(x, F.softplus(dt + dt_bias), A, B, C, D)[0]
    return y.flatten(-2) * F.silu(z)


@pytest.mark.parametrize("wide_skip", [False, True])
def test_mamba_split_conv1d_scan_combined(wide_skip):
    heads, head_dim, groups, state, width = 4, 8, 2, 6, 4
    torch.manual_seed(0)
    inner, channels = heads * head_dim, heads * head_dim + 2 * groups * state
    args = [torch.randn(2, 70, inner + channels + heads), torch.randn(channels, width), torch.randn(channels)]
    args += [torch.randn(heads), -torch.rand(heads), torch.randn(heads, head_dim) if wide_skip else torch.randn(heads)]
    args = [a.double().requires_grad_() for a in args]
    shape = dict(headdim=None if wide_skip else head_dim, ngroups=groups)
    got = kernels.mamba_split_conv1d_scan_combined(*args, 256, norm_before_gate=False, **shape)
    expected = mamba_ssm_reference(*args, heads, head_dim, groups)
    assert_same([got], [expected], atol=1e-10, rtol=1e-9)
    assert_same(gradients([got], args), gradients([expected], args), atol=1e-9, rtol=1e-8)
    with pytest.raises(TypeError, match="rmsnorm_weight"):  # what megatron-core does not give is refused, not ignored
        kernels.mamba_split_conv1d_scan_combined(*args, 256, rmsnorm_weight=torch.ones(inner), **shape)


def test_gated_norm_matches_transformers_and_order_matters():
    mamba2 = pytest.importorskip("transformers.models.mamba2.modeling_mamba2")
    x, z = torch.randn(2, 3, 32), torch.randn(2, 3, 32)
    reference, norm = mamba2.MambaRMSNormGated(32, 8, 1e-5), kernels.RMSNormGated(32, 1e-5, 8, False)
    reference.weight.data.uniform_()
    norm.load_state_dict(reference.state_dict())
    assert_same([norm(x, z)], [reference(x, z)])
    norm.norm_before_gate = True
    assert_same([norm(x, z)], [norm(x) * F.silu(z)])


@pytest.mark.parametrize("activation", ["silu", None])
def test_causal_conv1d(activation):
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, 11, 6).double(), torch.randn(6, 4).double(), torch.randn(6).double()
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    expected = F.conv1d(x.mT, weight[:, None], bias, padding=3, groups=6)[..., :11].mT
    expected = F.silu(expected) if activation else expected
    got, state = kernels.causal_conv1d(*leaves, activation, output_final_state=True)
    assert_same([got, state], [expected, x[:, -3:]])
    assert_same(gradients([got], leaves), gradients([expected], leaves), atol=1e-12, rtol=1e-10)
    first, state = kernels.causal_conv1d(x[:, :2], weight, bias, activation, output_final_state=True)
    second, state = kernels.causal_conv1d(x[:, 2:], weight, bias, activation, state, True)
    assert_same([torch.cat([first, second], 1), state], [expected, x[:, -3:]])


def test_norms_use_fp32_statistics():
    x, weight = (torch.randn(4, 64) * 300).bfloat16(), torch.rand(64).bfloat16()
    exact = x.double() * (x.double().square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.double()
    assert torch.equal(kernels.rms_norm(x, weight, 1e-6), exact.float().bfloat16())
    exact = x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert torch.equal(kernels.l2norm(x), exact.float().bfloat16())


def test_activation_recompute():
    from torch.utils.checkpoint import checkpoint

    inputs = gdn_inputs()
    again = checkpoint(kernels.chunk_gated_delta_rule, *inputs, use_reentrant=False)[0]
    plain = kernels.chunk_gated_delta_rule(*inputs)[0]
    assert_same(gradients([again], inputs), gradients([plain], inputs), atol=0, rtol=0)


def test_low_precision_inputs_are_computed_in_fp32():
    inputs = [x.detach().bfloat16() for x in gdn_inputs()]
    got, state = kernels.chunk_gated_delta_rule(*inputs, output_final_state=True)
    assert got.dtype == torch.bfloat16 and state.dtype == torch.float32
    expected = kernels.chunk_gated_delta_rule(*(x.float() for x in inputs))[0]
    assert torch.equal(got, expected.bfloat16())


def test_packed_sequences_are_refused():
    with pytest.raises(NotImplementedError, match="one sequence a row"):
        kernels.chunk_gated_delta_rule(*gdn_inputs(), cu_seqlens=torch.tensor([0, 5]))


# ---- start-up check ----

STATES = RankShape(rows=6, length=300, states=True)


@pytest.mark.parametrize("linear", ["gdn", "mamba2"])
def test_self_test_sees_the_last_state_that_ranks_pass(linear):
    name = {"gdn": "chunk_gated_delta_rule", "mamba2": "chunk_ssd"}[linear]

    def wrong_state(*args, **kwargs):
        out, last = getattr(TORCH, name)(*args, **kwargs)
        return out, None if last is None else 1.5 * last

    arch, broken = tiny.hybrid(linear), replace(TORCH, **{name: wrong_state})
    assert "agree" in self_test(arch, RankShape(length=200), device="cpu", kernels=broken)
    with pytest.raises(HyLoError, match="disagrees with the reference"):
        self_test(arch, RankShape(length=200, states=True), device="cpu", kernels=broken)


@pytest.mark.parametrize("linear", ["gdn", "mamba2", "kda"])
def test_self_test_passes_right_kernels_and_refuses_wrong_gradients(linear):
    arch = tiny.hybrid(linear)
    assert "agree" in self_test(arch, device="cpu", kernels=TORCH)

    def wrong_gradient(scan):
        # the value is right, one gradient is twice what it should be
        return lambda q, *args, **kwargs: scan(2 * q - q.detach(), *args, **kwargs)

    name = {"gdn": "chunk_gated_delta_rule", "mamba2": "chunk_ssd", "kda": "chunk_kda"}[linear]
    broken = replace(TORCH, name="broken", **{name: wrong_gradient(getattr(TORCH, name))})
    with pytest.raises(HyLoError, match="broken's .* disagrees with the reference"):
        self_test(arch, device="cpu", kernels=broken)
    for shape in (RankShape(rows=2, length=600), RankShape(rows=2, length=600, states=True)):
        assert "agree" in self_test(arch, shape, device="cpu", kernels=TORCH)
        with pytest.raises(HyLoError, match="broken's .* disagrees with the reference"):
            self_test(arch, shape, device="cpu", kernels=broken)


@pytest.mark.parametrize("layout, work, shape", [
    (ParallelLayout(), Work(seq_length=600, micro_batch=2), RankShape(rows=2, length=600)),
    (ParallelLayout(tp=2), Work(seq_length=600), RankShape(split=2, length=600)),
    (ParallelLayout(cp=2, linear_cp="states"), Work(seq_length=1200, micro_batch=3), STATES),
    (ParallelLayout(cp=2), Work(seq_length=1200, micro_batch=3), STATES),
    (ParallelLayout(cp=2, linear_cp="a2a"), Work(seq_length=600), RankShape(split=2, length=600)),
], ids=["one rank", "tensor parallel", "states", "states by default", "heads"])  # fmt: skip
def test_self_test_runs_kernels_at_the_shape_of_the_run(layout, work, shape):
    """fla tunes kernels by the number of heads, rows and tokens: the first step finds them tuned."""
    arch, seen = tiny.hybrid("gdn"), []
    assert RankShape.of(arch, layout, work) == shape

    def rule(q, k, v, *args, **kwargs):
        seen.append((*v.shape, kwargs.get("initial_state") is not None, kwargs.get("output_final_state", False)))
        return TORCH.chunk_gated_delta_rule(q, k, v, *args, **kwargs)

    assert "agree" in self_test(arch, shape, device="cpu", kernels=replace(TORCH, chunk_gated_delta_rule=rule))
    gdn, width = arch.geometry.gdn, arch.geometry.gdn.value_head_dim + shape.states * arch.geometry.gdn.key_head_dim
    assert seen == [(shape.rows, shape.length, gdn.num_value_heads // shape.split, width, shape.states, shape.states)]
    assert RankShape(rows=64, length=2048).compared == LENGTH // 4
