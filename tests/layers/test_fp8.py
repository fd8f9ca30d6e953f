"""A teacher whose layers multiply in FP8, and students that cannot."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny  # noqa: E402
from helpers import train as helpers  # noqa: E402
from megatron.core.models.hybrid import hybrid_block  # noqa: E402
from programs import parity  # noqa: E402

from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.kernels.fp8 import LARGEST, quantise_rows, scaled_product  # noqa: E402
from hylo_megatron.layers import fp8  # noqa: E402
from hylo_megatron.layers.load import layout_config  # noqa: E402
from hylo_megatron.layers.model import build_model  # noqa: E402

pytestmark = pytest.mark.usefixtures("process_groups")


def test_rows_are_rounded_to_four_bits():
    x = torch.randn(5, 64) * torch.tensor([1e-20, 1e-3, 1.0, 1e6, 0.0])[:, None]
    rows, scale = quantise_rows(x)
    back = rows.float() * scale
    assert rows.float().abs().amax(1).tolist() == [LARGEST] * 4 + [0.0]
    assert ((back - x).abs() <= x.abs() / 16 + scale * 2**-10).all() and (back[:4] != x[:4]).any()


def test_products_are_those_of_the_rounded_factors():
    x, w = torch.randn(7, 64), torch.randn(48, 64)
    (a, a_scale), (b, b_scale) = quantise_rows(x), quantise_rows(w)
    want = (a.float() * a_scale) @ (b.float() * b_scale).t()
    torch.testing.assert_close(scaled_product(a, a_scale, b, b_scale, torch.float32), want)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, process_groups):
    return helpers.write_pair(tmp_path_factory.mktemp("pair"), "gdn")


def logits(model, dtype: torch.dtype) -> torch.Tensor:
    batch = helpers.token_batch(2, 32)
    with torch.no_grad():
        return model.teacher(batch["tokens"], batch["position_ids"], None).float()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_teacher_says_nearly_the_same_in_half_the_memory(pair, dtype):
    model = parity.distill_model(*pair, "distill", "all", dtype=dtype)
    want, weights = logits(model, dtype), dict(model.teacher.decoder.named_parameters())
    fp8.to_fp8(model.teacher)
    got = logits(model, dtype)
    gap = (got - want).norm() / want.norm()
    assert 1e-3 < gap < 0.1
    now = dict(model.teacher.decoder.named_parameters())
    rounded = [name for name, weight in now.items() if weight.dtype == torch.float8_e4m3fn]
    assert now.keys() == weights.keys() and len(rounded) == 4 * 4  # qkv, output, gate and up, down of each layer
    assert all(weights[name].dim() == 1 for name in now.keys() - set(rounded))
    with pytest.raises(RuntimeError, match="no gradient"):
        model.teacher(torch.zeros(1, 4, dtype=torch.long), torch.arange(4)[None], None)


def test_what_has_no_fp8_is_refused(monkeypatch):
    with pytest.raises(HyLoError, match="layers.0 of the teacher is 24 x 64 on a rank, expected multiples of 16"):
        fp8.check_widths("layers.0", torch.empty(24, 64))
    layer = torch.nn.Linear(64, 24, bias=False)
    layer.fuse_wgrad_accumulation = False  # what TransformerEngine's layers have
    with pytest.raises(HyLoError, match="--fp8-format: 0 of the student is 24 x 64 on a rank, expected multiples"):
        fp8.check_projections(SimpleNamespace(decoder=torch.nn.Sequential(layer)))
    old = dict(device_count=1, get_device_capability=(8, 0), get_device_name="A100")
    cuda = SimpleNamespace(**{name: lambda value=value: value for name, value in old.items()})
    monkeypatch.setattr(fp8.torch, "cuda", cuda)
    with pytest.raises(HyLoError, match="--hylo-teacher-fp8: A100 has no FP8 products"):
        fp8.check_card()
    with pytest.raises(HyLoError, match="--fp8-format: A100 has no FP8 products"):
        fp8.check_card("--fp8-format")


@pytest.mark.parametrize("linear, layer", [("gdn", "GDN"), ("mamba2", "Mamba")])
def test_what_megatron_asserts_of_widths_is_one_line(linear, layer, monkeypatch):
    monkeypatch.setattr(hybrid_block, "get_fp8_context", lambda *_, **__: contextlib.nullcontext())
    arch = tiny.hybrid(linear)
    config = layout_config(arch)
    config.fp8 = "hybrid"  # TransformerConfig itself would ask for TransformerEngine
    words = rf"^--fp8-format: .*{layer} layer .* multiple of 16\); leave it out$"
    with pytest.raises(HyLoError, match=words), fp8.refusing_widths():
        build_model(arch, config)
