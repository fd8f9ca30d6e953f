"""Distillation in process: the chunked loss against whole logits, layer losses, the model that megatron trains."""

import re
import subprocess
import sys

import pytest
import torch
from helpers.paths import PROGRAMS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers  # noqa: E402
from helpers.kl import VOCAB, gradients, kl_inputs, reference_loss, whole_logits  # noqa: E402
from helpers.waits import PATIENCE  # noqa: E402
from programs import parity  # noqa: E402

from hylo_megatron.distill.head import TokenWeights  # noqa: E402
from hylo_megatron.distill.ild import layer_losses  # noqa: E402
from hylo_megatron.distill.losses import KL, LayerDistance  # noqa: E402
from hylo_megatron.layers.load import load_model  # noqa: E402


@pytest.mark.parametrize("chunk", [7, 16, 1024], ids="chunk{}".format)
@pytest.mark.parametrize("weights", [(0.7, 0.3), (1.0, 0.0), (0.0, 1.0)], ids=["kl+ce", "kl", "ce"])
@pytest.mark.parametrize("temperature", [1.0, 2.0])
@pytest.mark.parametrize("reverse", [False, True], ids=["forward", "reverse"])
@pytest.mark.parametrize("teacher_length", [None, 21], ids=["taught", "partly"])
def test_chunked_loss_equals_whole_logits(teacher_length, reverse, temperature, weights, chunk):
    settings = KL(
        kl_weight=weights[0], ce_weight=weights[1], temperature=temperature, reverse=reverse, chunk=chunk,
        teacher_length=teacher_length, ce_beyond=0.6,
    )  # fmt: skip
    x = kl_inputs(32, settings)
    assert 0 < x.mask_T.sum() < 32
    loss, kl, ce = settings(x)
    want, want_kl, want_ce = whole_logits(x, settings)
    torch.testing.assert_close(loss, want, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(ce, want_ce, rtol=2e-6, atol=1e-5)
    torch.testing.assert_close(kl, want_kl if settings.kl_weight else torch.zeros(()), rtol=2e-6, atol=1e-5)
    got = gradients(loss, x.h_TD, x.head_ND)
    for gradient, expected in zip(got, gradients(want, x.h_TD, x.head_ND), strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
    assert not got[1][VOCAB:].any()
    assert not got[0][x.mask_T == 0].any()


def test_loss_without_a_gradient_for_the_head():
    x = kl_inputs(32)
    x.head_ND.requires_grad_(False)
    (got,) = gradients(KL()(x)[0], x.h_TD)
    (want,) = gradients(whole_logits(x, KL())[0], x.h_TD)
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_weights_follow_the_teachers_reach_and_the_answers():
    settings = KL(kl_weight=0.9, ce_weight=0.1, teacher_length=2, ce_beyond=0.5)
    mask, answers = torch.tensor([1.0, 1.0, 1.0, 0.0]), torch.tensor([0.0, 3.0, 3.0, 3.0])
    kl, ce = settings.token_weights(torch.arange(4), mask, answers)
    assert kl.tolist() == pytest.approx([0.9, 0.9, 0.0, 0.0])
    assert ce.tolist() == pytest.approx([0.1, 3.1, 3.5, 0.0])


def test_fused_chunk_equals_the_torch_one():
    pytest.importorskip("triton")
    command = [sys.executable, str(PROGRAMS / "fused_loss.py")]
    environment = helpers.environment(TRITON_INTERPRET="1")
    result = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert result.stdout.strip().endswith("equal"), result.stderr[-2000:]


class LargestTensor(TorchDispatchMode):
    """Elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.elements = max([self.elements, *sizes])
        return out


def largest(loss, settings: KL, length: int) -> int:
    x = kl_inputs(length, settings, rows=500, vocab=490, width=4, teacher_width=6)
    with LargestTensor() as seen:
        gradients(loss(x), x.h_TD, x.head_ND)
    return seen.elements


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.5, 0.5)])
def test_no_tensor_grows_with_tokens_times_vocabulary(weights):
    settings = KL(kl_weight=weights[0], ce_weight=weights[1], temperature=2.0, chunk=16)
    for length in (64, 1024):
        assert largest(lambda x: settings(x)[0], settings, length) == 16 * 500
        assert largest(lambda x: whole_logits(x, settings)[0], settings, length) >= length * 490


# ---- layer by layer ----


class ToyLayer(torch.nn.Module):
    """Adds to the hidden state what a layer would; returns a tuple or a tensor, as megatron's layers do."""

    def __init__(self, as_tuple: bool):
        super().__init__()
        self.weight, self.as_tuple = torch.nn.Parameter(torch.randn(6, 6)), as_tuple

    def forward(self, hidden_states, attention_mask=None):
        out = hidden_states + torch.tanh(hidden_states @ self.weight)
        return (out, None) if self.as_tuple else out


def test_layer_losses_equal_a_loop_over_tokens():
    torch.manual_seed(0)
    layers = [ToyLayer(index % 3 == 0) for index in range(4)]
    states = [torch.randn(5, 2, 6) for _ in range(5)]
    mask, norms = torch.tensor([[1.0, 0], [1, 1], [0, 0], [1, 0], [1, 1]]), torch.tensor([[2.0, 3.0], [0.5, 7.0]])
    got = layer_losses(layers, states, mask, norms)
    want = torch.zeros(2, 2)
    for base in range(2):
        for s, b in mask.nonzero().tolist():
            x = states[2 * base][s, b]
            mixed = x + torch.tanh(x @ layers[2 * base].weight)
            after = mixed + torch.tanh(mixed @ layers[2 * base + 1].weight)
            attention = (mixed - x) - (states[2 * base + 1][s, b] - x)  # what the two mixers add
            want[base] += torch.stack([attention.norm(), (after - states[2 * base + 2][s, b]).norm()]) / norms[base]
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
    # layers do not depend on one another: the second pair's loss leaves the first pair alone
    assert not torch.autograd.grad(got[1].sum(), layers[0].weight)[0].any()


# ---- the model ----


@pytest.fixture(scope="module", params=["gdn", "mamba2"])
def pair(request, tmp_path_factory, process_groups):
    return helpers.write_pair(tmp_path_factory.mktemp(request.param), request.param)


@pytest.mark.parametrize("wide", [False, True], ids=["same teacher", "wider teacher"])
def test_distill_equals_the_two_models_logits(pair, wide, tmp_path):
    teacher = helpers.big_teacher(tmp_path / "big") if wide else pair[1]
    settings = KL(kl_weight=0.7, ce_weight=0.3, temperature=2.0, chunk=50, teacher_length=11, ce_beyond=0.5)
    model = parity.distill_model(pair[0], teacher, "distill", "all", settings)
    x = helpers.token_batch(3, 16)
    loss, kl, ce = model(*x.values())
    models = (model.student, model.teacher)  # the wide teacher has rows beyond the tokens
    logits = [m(x["tokens"], x["position_ids"], None)[..., : helpers.ODD_VOCAB].float() for m in models]
    kl_weight, ce_weight = settings.token_weights(x["position_ids"], x["loss_mask"], x["answer_weight"])
    weights = TokenWeights(
        labels_T=x["labels"].flatten(), mask_T=x["loss_mask"].flatten(), kl_T=kl_weight.flatten(),
        ce_T=ce_weight.flatten(),
    )  # fmt: skip
    want, want_kl, want_ce = reference_loss(*(value.flatten(0, 1) for value in logits), weights, settings)
    torch.testing.assert_close(torch.stack([loss, kl, ce]), torch.stack([want, want_kl, want_ce]), rtol=1e-5, atol=0)
    parameters = dict(model.named_parameters())
    got = torch.autograd.grad(loss, parameters.values(), retain_graph=True)
    for name, gradient, expected in zip(parameters, got, torch.autograd.grad(want, parameters.values()), strict=True):
        assert (gradient - expected).abs().max() <= 2e-5 * expected.abs().max(), name


def test_an_evaluation_adds_nothing_to_the_log_of_layers(pair):
    model = parity.distill_model(*pair, "ild", "mixers", LayerDistance())
    x, y = (helpers.token_batch(2, 16, seed=seed) for seed in (1, 2))
    model(*x.values())
    want = model.take_layer_sums()
    model.eval()
    model(*y.values())
    model.train()
    model(*x.values())
    for found, expected in zip(model.take_layer_sums(), want, strict=True):
        assert expected.any() and torch.equal(found, expected)


@pytest.mark.parametrize("stage", ["ild", "distill"])
def test_the_engine_sees_the_student_only(pair, stage):
    model = parity.distill_model(*pair, stage, "all", KL())
    student, _ = load_model(pair[0])
    metadata = {"dp_cp_group": parity.parallel_state.get_data_parallel_group(with_context_parallel=True)}

    def stored(module):
        return [key for key in module.sharded_state_dict(metadata=metadata) if not key.endswith("_extra_state")]

    assert sorted(model.sharded_state_dict(metadata=metadata)) == sorted(stored(student))
    assert [n for n, _ in model.named_parameters()] == [f"student.{n}" for n, _ in student.named_parameters()]
    assert not any(model.teacher is module for module in model.modules())
    assert not any(parameter.requires_grad for parameter in model.teacher.parameters())
    assert not model.teacher.training


COPIED = re.compile(r"embedding|output_layer|final_norm|\.mlp\.|layernorm|layers\.\d+\.norm\.")


@pytest.mark.parametrize("stage", ["ild", "distill"])
def test_mixers_only_freezes_exactly_what_was_copied(pair, stage):
    model = parity.distill_model(*pair, stage, "mixers", KL())
    frozen = {name for name, p in model.student.named_parameters() if not p.requires_grad}
    names = {name for name, _ in model.student.named_parameters()}
    assert frozen == {name for name in names if COPIED.search(name)}
    copied_keys = {name for name, _ in model.teacher.named_parameters() if ".self_attention." not in name}
    assert {re.sub(r"(layers\.\d+)\.norm\.", r"\1.input_layernorm.", name) for name in frozen} == copied_keys
    x = helpers.token_batch(2, 16)
    model(*x.values())[0].backward()
    for name, parameter in model.student.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == (name not in frozen), name
    assert all(parameter.grad is None for parameter in model.teacher.parameters())


@pytest.mark.parametrize("halves", [3, 100])
def test_recompute_with_a_frozen_embedding_changes_no_gradient(pair, halves):
    """The engine's checkpoint gives none to layers whose input needs none."""
    again = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=halves)
    x, found = helpers.token_batch(2, 16), []
    for config in ({}, again):
        model = parity.distill_model(*pair, "distill", "mixers", KL(), config=config)
        model.train()  # the engine recomputes then only
        model(*x.values())[0].backward()
        found.append({name: parameter.grad for name, parameter in model.student.named_parameters()})
    plain, recomputed = found
    assert any(gradient is not None for gradient in plain.values())
    for name, gradient in plain.items():
        assert (gradient is None) == (recomputed[name] is None), name
        if gradient is not None:
            torch.testing.assert_close(recomputed[name], gradient, rtol=1e-5, atol=1e-9)


def test_decay_parameters_stay_fp32(pair):
    student, arch = load_model(pair[0])
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    student.bfloat16()
    kept = {name for name, parameter in student.named_parameters() if parameter.dtype == torch.float32}
    suffixes = ("A_log", "dt_bias") + (("D",) if "mamba2" in arch.plan else ())
    assert {name.rsplit(".", 1)[1] for name in kept} == set(suffixes)
    assert len(kept) == len(suffixes) * sum(kind != "mla" for kind in arch.plan)
    for name, parameter in student.named_parameters():
        assert name in kept or parameter.dtype == torch.bfloat16
        assert torch.equal(parameter, before[name]) if name in kept else True


# ---- platform ----


def test_a_device_context_still_works_after_the_shim():
    with torch.device("meta"):
        made = [torch.empty(2), torch.zeros(2), torch.ones(2), torch.full((2,), 1.0), torch.rand(2), torch.randn(2),
                torch.arange(2), torch.tensor([1.0]), torch.nn.Linear(2, 2).weight]  # fmt: skip
    assert [x.device.type for x in made] == ["meta"] * len(made)
    assert torch.empty(2).device.type == "cpu"
