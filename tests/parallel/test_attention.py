"""Attention under context parallelism: latents go round or are gathered, and the result is one process's."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from helpers import tiny
from helpers import train as helpers
from programs import latents as shapes

from hylo_megatron import train
from hylo_megatron.config.layout import ParallelLayout, Work, check_exchange
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import attention
from hylo_megatron.kernels import self_test as start_check
from hylo_megatron.kernels.choose import TORCH
from hylo_megatron.mixers.megatron_attention import refuse_packed
from hylo_megatron.parallel import self_test as across
from hylo_megatron.parallel.exchange import Gather, Ring, exchange


@pytest.mark.parametrize("ranks", [2, 4])
def test_ring_and_gather_are_exact_and_send_what_heads_share_only(ranks):
    run = helpers.torchrun(shapes.__file__, processes=ranks)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    (control,) = [line for line in lines if line["case"] == "unweighted"]
    assert control["error"] > 0.01
    lines.remove(control)
    widths = {"latents": shapes.R + shapes.P, "keys and values": shapes.H * (shapes.K + shapes.V)}
    assert [(line["over"], line["case"]) for line in lines] == [
        (over, case) for over in widths for case in shapes.CASES
    ]
    assert max(line["error"] for line in lines) < 5e-6
    for line in lines:
        ring = line["case"] == "ring" or (line["case"] == "auto, large" and ranks > 2)
        held = shapes.LOCAL * shapes.B * widths[line["over"]] if ring else 0
        assert line["forward"] == (ranks - 1) * held
        assert line["backward"] == (ranks - 1) * held + ranks * held  # once more, and their gradients home


@pytest.mark.parametrize(
    "mode, ranks, held, kind, together",
    [
        ("auto", 4, 2**20, Gather, 512),
        ("auto", 4, 2**30, Ring, None),
        ("auto", 2, 2**32, Gather, 1),  # two ranks hold both tensors either way
        (None, 4, 2**20, Gather, 512),
        ("p2p", 2, 2**20, Ring, None),
        ("all_gather", 4, 2**32, Gather, 1),
    ],
)
def test_the_exchange_is_chosen_by_size(mode, ranks, held, kind, together, monkeypatch):
    monkeypatch.setattr("torch.distributed.get_process_group_ranks", lambda group: list(range(ranks)))
    group = type("Group", (), {"size": lambda _: ranks, "rank": lambda _: 0})()
    ways = exchange(group, mode, held, 4 * held)
    assert type(ways) is kind
    assert getattr(ways, "together", None) == together


def test_what_attention_cannot_do_is_refused():
    with pytest.raises(HyLoError, match="--cp-comm-type a2a: .* p2p .*, all_gather, and auto"):
        check_exchange("a2a")
    with pytest.raises(HyLoError, match="packed_seq_params"):
        refuse_packed(object())
    refuse_packed(None)


@pytest.mark.parametrize("groups", [4, 2])
@pytest.mark.parametrize("key_width, value_width", [(16, 8), (50, 50), (16, 24)])
@pytest.mark.parametrize("causal, keys", [(True, 12), (False, 12), (False, 6)])
def test_flash_attention_equals_the_plain_one(causal, keys, key_width, value_width, groups, monkeypatch):
    kernel, widths = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, []

    def watched(q, k, v, *args, **kwargs):
        widths.extend(x.shape[-1] for x in (q, k, v))
        return kernel(q, k, v, *args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", watched)
    generator = torch.Generator().manual_seed(0)
    shapes = (4, 12, key_width), (groups, keys, key_width), (groups, keys, value_width), (4, 12, value_width)
    q, k, v, d_out = (torch.randn(2, *shape, generator=generator) for shape in shapes)
    out, lse = attention.attend(q, k, v, causal, 0.3)
    assert len(set(widths)) == 1 and widths[0] % 8 == 0  # all that a GPU's kernel takes
    plain, plain_lse = attention.attend_plain(q, k, v, causal, 0.3)
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, plain_lse, rtol=1e-5, atol=1e-5)
    got = attention.attend_backward(d_out, q, k, v, plain, plain_lse, causal, 0.3)
    want = attention.attend_plain_backward(d_out, q, k, v, plain, plain_lse, causal, 0.3)
    for gradient, expected in zip(got, want, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)


# ---- start-up check ----


BASE = tiny.hybrid(plan=("attention",) * 4, geometry=None)  # has shared key heads


def checked(ranks: int = 3, kernels=TORCH) -> str:
    """Return the verdict on attention across ranks of a hybrid, and of a base model with shared key heads."""
    models, layout = [tiny.hybrid("gdn"), BASE], ParallelLayout(cp=ranks)
    cases = across.attention_cases(models, layout, Work(micro_batch=2), "cpu")
    return start_check.self_test(SimpleNamespace(plan=()), device="cpu", kernels=kernels, more=cases)


@pytest.fixture
def kernel(monkeypatch):
    """Set what is done to the results of the fused kernel and of its backward pass."""

    def change(backward: bool, changed) -> None:
        name = "_scaled_dot_product_flash_attention_for_cpu" + "_backward" * backward
        original = getattr(torch.ops.aten, name)
        monkeypatch.setattr(torch.ops.aten, name, lambda *args, **kwargs: changed(*original(*args, **kwargs)))

    return change


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_check_at_start_up_passes_right_kernels(ranks):
    assert "mla across ranks" in checked(ranks) and "attention across ranks" in checked(ranks)
    assert across.attention_cases([tiny.hybrid("gdn")], ParallelLayout(), Work(), "cpu") == {}


def test_a_last_size_of_one_is_allowed(kernel):
    """cuDNN's kernel returns it."""
    q = torch.randn(1, 2, 4, 8)
    plain = [attention.attend(q, x, x, True, 0.3) for x in (q, q.flip(2))]
    kernel(False, lambda out, lse: (out, lse[..., None]))
    wide = [attention.attend(q, x, x, True, 0.3) for x in (q, q.flip(2))]
    for first, second in (plain, wide):
        attention.join_attention(*first, *second)
    assert wide[0][1].shape == (1, 2, 4, 1) and torch.equal(wide[0][1][..., 0], plain[0][1])
    assert torch.equal(wide[0][0], plain[0][0])


@pytest.mark.parametrize("backward, changed", [
    (False, lambda out, lse: (out, lse / math.log(2))),
    (False, lambda out, lse: (out, lse.exp())),
    (False, lambda out, lse: (out, lse.flip(1))),
    (True, lambda d_q, d_k, d_v: (d_q, 2 * d_k, d_v)),
], ids=["base 2", "no logarithm", "other heads", "gradient"])  # fmt: skip
def test_a_kernel_whose_blocks_cannot_be_joined_is_refused_at_start_up(backward, changed, kernel):
    kernel(backward, changed)
    with pytest.raises(HyLoError, match="mla across ranks disagrees .*--context-parallel-size 1") as refusal:
        checked()
    assert "\n" not in str(refusal.value)


def test_a_join_that_reads_some_denominators_late_is_refused_at_start_up():
    """As warps did that read a denominator after another warp had written the joined one."""

    def late(out, lse, part, part_lse):
        rows = slice(out.shape[2] - out.shape[2] // 64, None)
        before = out.clone()
        attention.join_attention(out, lse, part, part_lse)
        again = lse[:, :, rows].clone()
        attention.join_attention(before[:, :, rows], again, part[:, :, rows], part_lse[:, :, rows])
        out[:, :, rows] = before[:, :, rows]

    with pytest.raises(HyLoError, match="mla across ranks, joined disagrees .*: the kernel that joins blocks"):
        checked(kernels=replace(TORCH, join_attention=late))


def test_another_shape_of_the_denominators_is_refused(kernel):
    kernel(False, lambda out, lse: (out, torch.nn.functional.pad(lse, (0, 32))))
    with pytest.raises(HyLoError, match=r"log-sum-exp of fused attention has the shape \[2, 4, .*expected \[2, 4, "):
        checked()


def test_a_training_checks_the_attention_of_student_and_teacher(monkeypatch, tmp_path):
    student, found = tiny.hybrid("gdn"), {}
    BASE.save(tmp_path)
    layout = ParallelLayout(cp=2), Work(seq_length=512)
    for name in ("set_device", "empty_cache", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda *args: None)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(train, "layout_of", lambda args: layout)
    monkeypatch.setattr(across, "random_bf16", lambda *shape, device: torch.zeros(shape))
    monkeypatch.setattr(start_check, "self_test", lambda *args, more: found.update(more))
    args = SimpleNamespace(bf16=True, no_self_test=False, local_rank=0, rank=0, hylo_teacher=tmp_path)
    train.check_kernels(args, student)
    names = ["mla across ranks", "attention across ranks"]
    assert list(found) == [*names, *(f"{name}, joined" for name in names)]
