"""MLA under context parallelism: latents go round or are gathered, and the result is one process's."""

import json

import parallel_latents as shapes
import pytest
import train_helpers as helpers


@pytest.mark.parametrize("ranks", [2, 4])
def test_ring_and_gather_are_exact_and_send_latents_only(ranks):
    run = helpers.torchrun(shapes.__file__, processes=ranks)
    assert run.returncode == 0, run.stderr[-3000:]
    ring, gather = (json.loads(line) for line in run.stdout.splitlines() if line.startswith("{"))
    assert ring["ring"] and not gather["ring"]
    assert max(ring["error"], gather["error"]) < 5e-6
    latents = shapes.LOCAL * shapes.B * (shapes.R + shapes.P)
    assert ring["forward"] == (ranks - 1) * latents
    assert ring["backward"] == (ranks - 1) * latents + ranks * latents  # the latents again, and their gradients home
