"""Attention under context parallelism: latents go round or are gathered, and the result is one process's."""

import json

import pytest
import torch
from helpers import train as helpers
from programs import latents as shapes

from hylo_megatron.config.layout import check_exchange
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import attention
from hylo_megatron.mixers.megatron_attention import refuse_packed
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
