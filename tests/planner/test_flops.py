"""The planner's FLOPs against those that torch counts."""

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import tiny  # noqa: E402
from helpers.train import token_batch  # noqa: E402

from hylo_megatron.config import GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry  # noqa: E402
from hylo_megatron.config.stages import stage_kind  # noqa: E402
from hylo_megatron.distill.losses import KL, LayerDistance  # noqa: E402
from hylo_megatron.distill.model import DistillModel  # noqa: E402
from hylo_megatron.distill.settings import DistillSettings  # noqa: E402
from hylo_megatron.kernels import gated_delta, ssd  # noqa: E402
from hylo_megatron.layers.load import layout_config  # noqa: E402
from hylo_megatron.layers.model import build_model  # noqa: E402
from hylo_megatron.mixers.kda.geometry import KDAGeometry  # noqa: E402
from hylo_megatron.planner.flops import mixing, token_flops  # noqa: E402

LENGTH = 64
WIDE = Geometry(MLAGeometry(24, 8, 8, 12), GDNGeometry(2, 4, 64, 64), Mamba2Geometry(4, 64, 64, 4), KDAGeometry(4, 64))


def counted(call) -> dict[str, int]:
    with FlopCounterMode(display=False) as counter:
        call()
    return {str(op): flops for op, flops in counter.get_flop_counts()["Global"].items()}


@pytest.mark.parametrize("stage, train, taught, window", [
    ("distill", "all", None, None), ("distill", "all", 24, None), ("distill", "mixers", None, None),
    ("ild", "mixers", None, None), ("ild", "all", None, None), ("distill", "all", None, {"size": 8, "sinks": 2}),
    ("distill", "all", None, {"size": 8, "sinks": 2, "mla": True}),
])  # fmt: skip
def test_products_of_a_step_are_those_that_torch_counts(process_groups, stage, train, taught, window):
    """To the zeros that make a projection's width a multiple of 16."""
    student, kind = tiny.hybrid("gdn", vocab_size=301, window=window), stage_kind(stage)
    teacher = replace(student.as_teacher(), intermediate_size=80)
    assert mixing(student, LENGTH) - mixing(replace(student, window=None), LENGTH) == (
        (4 if "mla" in window else 2) * 4 * 10 * 64 if window else 0
    )
    loss = LayerDistance() if kind.layerwise else KL(chunk=32, teacher_length=taught)
    built = [build_model(arch, layout_config(arch, use_cpu_initialization=True)) for arch in (student, teacher)]
    model = DistillModel(*built, student, teacher, DistillSettings(kind=kind, train=train, loss=loss)).train()
    batch = token_batch(1, LENGTH, 301)

    def step():
        model(batch["tokens"], batch["position_ids"], batch["labels"], batch["loss_mask"])[0].backward()

    planned = model.token_flops(LENGTH)
    assert planned == token_flops(student, teacher, kind, train=train, length=LENGTH, taught=taught)
    products = planned.teacher_products + planned.student_products
    assert products == pytest.approx(counted(step)["aten.mm"] / LENGTH, rel=0.03 if window else 0.015)


@pytest.mark.parametrize("kind, key, value", [("attention", 16, 16), ("mla", 16, 12)])
def test_attention_counts_half_of_all_pairs(kind, key, value):
    arch = tiny.hybrid(plan=(kind,), geometry=WIDE) if kind == "mla" else tiny.hybrid().as_teacher()
    heads, layers = arch.num_attention_heads, arch.num_layers
    q, k, v = (torch.randn(1, heads, LENGTH, size) for size in (key, key, value))
    with sdpa_kernel(SDPBackend.MATH):
        found = counted(lambda: torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True))
    assert 2 * mixing(arch, LENGTH) * LENGTH == layers * sum(found.values())


@pytest.mark.parametrize("size", [LENGTH - 2, LENGTH, 4 * LENGTH])
def test_a_window_as_wide_as_the_text_counts_as_attention(size):
    arch = tiny.hybrid(plan=("gdn",) * 4)
    wide = replace(arch, window={"size": size, "sinks": 2})
    assert mixing(wide, LENGTH) - mixing(arch, LENGTH) == mixing(arch.as_teacher(), LENGTH)


@pytest.mark.parametrize("kind", ["gdn", "kda", "mamba2"])
def test_linear_blocks_count_as_recurrences(kind):
    """The update of the state is an outer product, element by element, which torch does not count."""
    heads, size = 4, 64
    q, k, v = (torch.randn(1, 1, heads, size) for _ in range(3))
    beta, decay = torch.rand(1, 1, heads), -torch.rand(1, 1, heads)
    calls = {
        "gdn": lambda: gated_delta.recurrent_gated_delta_rule(q, k, v, g=decay, beta=beta),
        "kda": lambda: gated_delta.recurrent_kda(q, k, v, -torch.rand(q.shape), beta, use_qk_l2norm_in_kernel=True),
        "mamba2": lambda: ssd.recurrent_ssd(v, beta, -torch.ones(heads), k, q),
    }  # fmt: skip
    update = 2 * heads * size * size
    assert mixing(tiny.hybrid(plan=(kind,), geometry=WIDE), LENGTH) == sum(counted(calls[kind]).values()) + update
