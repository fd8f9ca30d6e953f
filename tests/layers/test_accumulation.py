"""Gradients that are added inside the products, with a stand-in for Apex's kernel."""

from types import SimpleNamespace

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402
from megatron.core.tensor_parallel import layers  # noqa: E402

from hylo_megatron.layers import accumulation  # noqa: E402
from hylo_megatron.layers.load import load_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("process_groups")


def add_product(inputs: torch.Tensor, gradient: torch.Tensor, main_grad: torch.Tensor) -> None:
    main_grad += gradient.flatten(0, -2).t() @ inputs.flatten(0, -2)


@pytest.fixture
def apex(monkeypatch):
    kernel = SimpleNamespace(wgrad_gemm_accum_fp32=add_product)
    monkeypatch.setattr(layers, "fused_weight_gradient_mlp_cuda", kernel, raising=False)
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", True)
    monkeypatch.setattr(accumulation, "on_gpu", lambda weight: True)


def gradients(folder, accumulate: bool) -> tuple[dict, int]:
    """Return what two micro-batches add to the main gradients, as megatron-core's DDP adds, and the layers that do."""
    model, _ = load_model(folder)
    weights = dict(model.decoder.named_parameters())
    for weight in weights.values():
        weight.main_grad, weight.grad_added_to_main_grad = torch.zeros_like(weight), False
    inside = accumulation.accumulate_in_products(model) if accumulate else 0
    batch = tiny.tokens(length=16)
    for _ in range(2):
        model(batch, torch.arange(16).expand_as(batch), None).square().mean().backward()
        for weight in weights.values():
            if not weight.grad_added_to_main_grad:
                weight.main_grad += weight.grad
            weight.grad = None
    return {name: weight.main_grad for name, weight in weights.items()}, inside


@pytest.mark.parametrize("linear", ["gdn", "mamba2", "kda"])
def test_sums_are_those_of_a_pass_of_its_own(linear, tmp_path, apex):
    """The projection of a GDN block is wider than its weight has rows, and keeps the pass of its own."""
    student, _ = helpers.write_pair(tmp_path, linear)
    (want, _), (got, inside) = (gradients(student, accumulate) for accumulate in (False, True))
    assert inside >= 4 * 3
    for name, gradient in want.items():
        torch.testing.assert_close(got[name], gradient, rtol=1e-5, atol=1e-6, msg=name)


def test_without_apex_layers_stay_as_they_are(tmp_path, monkeypatch):
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    student, _ = helpers.write_pair(tmp_path, "gdn")
    assert gradients(student, True)[1] == 0


def test_layers_of_transformer_engine_need_no_apex(monkeypatch):
    monkeypatch.setattr(layers, "_grad_accum_fusion_available", False)
    layer = torch.nn.Linear(2, 2)
    layer.fuse_wgrad_accumulation = False
    assert accumulation.accumulate_in_products(SimpleNamespace(decoder=torch.nn.Sequential(layer))) == 1
    assert layer.fuse_wgrad_accumulation
