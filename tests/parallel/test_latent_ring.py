"""MLA under context parallelism: latents go round or are gathered, and the result is one process's."""

import json

import pytest
import torch
from helpers import train as helpers
from programs import latents as shapes

from hylo_megatron.parallel import latent_ring


@pytest.mark.parametrize("ranks", [2, 4])
def test_ring_and_gather_are_exact_and_send_what_heads_share_only(ranks):
    run = helpers.torchrun(shapes.__file__, processes=ranks)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert [(line["over"], line["ring"]) for line in lines] == [
        (over, ring) for over in ("latents", "keys and values") for ring in (True, False)
    ]
    assert max(line["error"] for line in lines) < 5e-6
    widths = {"latents": shapes.R + shapes.P, "keys and values": shapes.H * (shapes.K + shapes.V)}
    for line in lines[::2]:
        held = shapes.LOCAL * shapes.B * widths[line["over"]]
        assert line["forward"] == (ranks - 1) * held
        assert line["backward"] == (ranks - 1) * held + ranks * held  # once more, and their gradients home


@pytest.mark.parametrize("key_width, value_width", [(16, 8), (50, 50), (16, 24)])
@pytest.mark.parametrize("causal, keys", [(True, 12), (False, 12), (False, 6)])
def test_flash_attention_equals_the_plain_one(causal, keys, key_width, value_width, monkeypatch):
    kernel, widths = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu, []

    def watched(q, k, v, *args, **kwargs):
        widths.extend(x.shape[-1] for x in (q, k, v))
        return kernel(q, k, v, *args, **kwargs)

    monkeypatch.setattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu", watched)
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(2, 3, length, width, generator=generator)
                      for length, width in ((12, key_width), (keys, key_width), (keys, value_width),
                                            (12, value_width)))  # fmt: skip
    out, lse = latent_ring.attend(q, k, v, causal, 0.3)
    assert len(set(widths)) == 1 and widths[0] % 8 == 0  # all that a GPU's kernel takes
    plain, plain_lse = latent_ring.attend_plain(q, k, v, causal, 0.3)
    torch.testing.assert_close(out[..., :value_width], plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, plain_lse, rtol=1e-5, atol=1e-5)
    got = latent_ring.attend_backward(d_out, q, k, v, plain, plain_lse, causal, 0.3)
    want = latent_ring.attend_plain_backward(d_out, q, k, v, plain, plain_lse, causal, 0.3)
    for gradient, expected in zip(got, want, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
