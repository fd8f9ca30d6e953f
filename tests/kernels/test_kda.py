"""Kimi Delta Attention's torch kernels against fla's naive code, transformers and their own recurrence."""

import inspect
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from hylo_megatron import kernels


def inputs(batch=2, length=150, heads=3, key_dim=16, value_dim=24, dtype=torch.float64):
    """q, k, v, log decay, beta and a state, all with gradients."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(batch, length, heads, d, dtype=dtype) for d in (key_dim, key_dim, value_dim))
    g = -torch.rand(batch, length, heads, key_dim, dtype=dtype)
    beta = torch.rand(batch, length, heads, dtype=dtype)
    state = torch.randn(batch, heads, key_dim, value_dim, dtype=dtype)
    return [x.requires_grad_() for x in (F.normalize(q, dim=-1), F.normalize(k, dim=-1), v, g, beta, state)]


def with_gradients(run, leaves):
    """Outputs of ``run`` and the gradients of a fixed mix of them."""
    outs = run(*leaves)
    torch.manual_seed(1)
    return [*outs, *torch.autograd.grad(sum((out * torch.randn_like(out)).sum() for out in outs), leaves)]


def chunks(q, k, v, g, beta, state, **kwargs):
    return kernels.chunk_kda(q, k, v, g, beta, initial_state=state, output_final_state=True, **kwargs)


def steps(q, k, v, g, beta, state, **kwargs):
    return kernels.recurrent_kda(q, k, v, g, beta, initial_state=state, output_final_state=True, **kwargs)


def assert_same(got, expected, atol=1e-12, rtol=1e-10):
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), atol=atol, rtol=rtol)


@pytest.mark.parametrize("chunk_size", [16, 64, 128])
@pytest.mark.parametrize("length", [1, 5, 64, 130])
def test_chunks_match_steps(chunk_size, length):
    leaves, kwargs = inputs(length=length), dict(use_qk_l2norm_in_kernel=True, scale=0.3)
    got = with_gradients(lambda *x: chunks(*x, chunk_size=chunk_size, **kwargs), leaves)
    assert_same(got, with_gradients(lambda *x: steps(*x, **kwargs), leaves))


@pytest.mark.parametrize("reference", ["naive_recurrent_kda", "naive_chunk_kda"])
def test_matches_fla(reference):
    naive = pytest.importorskip("fla.ops.kda.naive")
    leaves = [x.detach().float() for x in inputs(length=128)]
    expected = getattr(naive, reference)(*leaves[:5], initial_state=leaves[5], output_final_state=True)
    assert_same(chunks(*leaves), expected, 2e-6, 2e-5)
    assert_same(steps(*leaves), expected, 2e-6, 2e-5)


def test_matches_transformers():
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    *leaves, state = (x.detach().float() for x in inputs(length=70))
    kwargs = dict(initial_state=state, output_final_state=True, use_qk_l2norm_in_kernel=True)
    scan = inspect.getclosurevars(kimi.chunk_kimi_delta_attention).nonlocals["torch_function"]  # not fla's on a GPU
    assert_same(kernels.chunk_kda(*leaves, **kwargs), scan(*leaves, **kwargs), 2e-6, 2e-5)
    config = SimpleNamespace(linear_head_dim=8, linear_num_heads=3, hidden_size=20)
    gate, x = kimi.KimiLinearForgetGate(config), torch.randn(2, 5, 20)
    torch.nn.init.normal_(gate.dt_bias)
    torch.nn.init.normal_(gate.A_log)
    gate.A_log.data = gate.A_log.data.view(3, 1)  # a head's rate; [1,1,H,1] there
    raw = gate.f_b_proj(gate.f_a_proj(x)).unflatten(-1, (3, 8))
    assert_same([kernels.kda_decay(raw, gate.A_log.flatten(), gate.dt_bias)], [gate(x)], 2e-6, 2e-5)


def test_the_decay_can_be_made_inside():
    *leaves, state = (x.detach() for x in inputs())
    rate, bias = torch.randn(3).double(), torch.randn(48).double()
    kwargs = dict(initial_state=state, output_final_state=True)
    decay = kernels.kda_decay(leaves[3], rate, bias)
    for kernel in (kernels.chunk_kda, kernels.recurrent_kda):
        inside = kernel(*leaves, A_log=rate, dt_bias=bias, **kwargs)
        assert_same(inside, kernel(*leaves[:3], decay, leaves[4], **kwargs), 0, 0)


def test_one_decay_for_all_channels_is_gated_deltanet():
    q, k, v, g, beta, state = inputs()
    got = with_gradients(lambda q, k, v, g, beta, s: chunks(q, k, v, g.expand_as(q), beta, s),
                         [q, k, v, g[..., :1].detach().requires_grad_(), beta, state])  # fmt: skip

    def gdn(q, k, v, g, beta, state):
        return kernels.chunk_gated_delta_rule(q, k, v, g[..., 0], beta, initial_state=state, output_final_state=True)

    assert_same(got, with_gradients(gdn, [q, k, v, g[..., :1].detach().requires_grad_(), beta, state]))


def test_gradcheck():
    leaves = inputs(1, 7, 2, 3, 2)
    assert torch.autograd.gradcheck(lambda *x: chunks(*x, chunk_size=4), leaves)


@pytest.mark.parametrize("decay", [-20.0, -1e4])
def test_strong_decay_is_finite_and_right(decay):
    leaves = [x.detach().float().requires_grad_() for x in inputs(length=130)]
    torch.manual_seed(2)
    leaves[3] = torch.where(torch.rand_like(leaves[3]) < 0.7, decay, -0.01).requires_grad_()
    exact = [x.detach().double().requires_grad_() for x in leaves]
    got = with_gradients(chunks, leaves)
    assert all(t.isfinite().all() for t in got)
    torch.manual_seed(1)
    weights = [torch.randn_like(out) for out in got[:2]]
    outs = steps(*exact)
    slopes = torch.autograd.grad(sum((o * w).sum() for o, w in zip(outs, weights, strict=True)), exact)
    assert_same(got, [*outs, *slopes], 1e-5, 1e-4)


def test_sigmoid_gate_of_the_norm():
    kimi = pytest.importorskip("transformers.models.kimi_linear.modeling_kimi_linear")
    norm, x, gate = kimi.KimiLinearRMSNormGated(24, 1e-5), torch.randn(2, 5, 3, 24), torch.randn(2, 5, 3, 24)
    torch.nn.init.uniform_(norm.weight)
    assert_same(
        [kernels.gated_rms_norm(x, gate, norm.weight, 1e-5, activation="sigmoid")], [norm(x, gate)], 2e-6, 2e-5
    )


def test_fla_takes_our_arguments():
    """What ``kernels/fused.py`` passes on to fla by name."""
    kda = pytest.importorskip("fla.ops.kda")
    names = {"A_log", "dt_bias", "scale", "initial_state", "output_final_state", "use_qk_l2norm_in_kernel"}
    step = inspect.signature(inspect.unwrap(kda.fused_recurrent_kda)).parameters
    chunk = inspect.signature(inspect.unwrap(kda.chunk_kda)).parameters
    assert names | {"use_gate_in_kernel"} <= set(step)
    assert (names - {"A_log", "dt_bias"}) | {"use_gate_in_kernel", "kwargs"} <= set(chunk)
