"""MLA under context parallelism: latents go round or are gathered, and the result is one process's."""

import json

import parallel_latents as shapes
import pytest
import torch
import train_helpers as helpers

from hylo_megatron.layers import latent_ring


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


@pytest.mark.parametrize("causal, keys", [(True, 12), (False, 12), (False, 6)])
def test_flash_attention_equals_the_plain_one(causal, keys):
    generator = torch.Generator().manual_seed(0)
    q, k, v, d_out = (torch.randn(2, 3, length, width, generator=generator)
                      for length, width in ((12, 16), (keys, 16), (keys, 8), (12, 8)))  # fmt: skip
    out, lse = latent_ring.attend(q, k, v, causal, 0.3)
    plain, plain_lse = latent_ring.attend_plain(q, k, v, causal, 0.3)
    torch.testing.assert_close(out[..., :8], plain, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(lse, plain_lse, rtol=1e-5, atol=1e-5)
    got = latent_ring.attend_backward(d_out, q, k, v, plain, plain_lse, causal, 0.3)
    want = latent_ring.attend_plain_backward(d_out, q, k, v, plain, plain_lse, causal, 0.3)
    for gradient, expected in zip(got, want, strict=True):
        torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5)
