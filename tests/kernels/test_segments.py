"""A recurrence in segments of the sequence computes what it computes at once."""

import pytest
import torch
import torch.nn.functional as F

from hylo_megatron.kernels.choose import TORCH
from hylo_megatron.kernels.segments import RECURRENCES, in_segments, segmented

LENGTH, B, H, K, V = 300, 2, 2, 8, 12


def inputs(name: str) -> list[torch.Tensor]:
    torch.manual_seed(0)
    wide = K if name == "chunk_kda" else V
    q, k = (F.normalize(torch.randn(B, LENGTH, H, K, dtype=torch.float64), dim=-1) for _ in range(2))
    v = torch.randn(B, LENGTH, H, wide, dtype=torch.float64)
    beta = torch.rand(B, LENGTH, H, dtype=torch.float64)
    decay = -torch.rand(B, LENGTH, H, *([K] if name == "chunk_kda" else []), dtype=torch.float64)
    state = torch.randn(B, H, K, wide, dtype=torch.float64)
    return [x.requires_grad_() for x in (q, k, v, decay, beta, state)]


@pytest.mark.parametrize("length", [64, 128, 256])
@pytest.mark.parametrize("name", RECURRENCES)
def test_segments_are_the_whole(name, length):
    q, k, v, g, beta, state = inputs(name)
    whole = getattr(TORCH, name)
    results = []
    for run in (whole, in_segments(whole, length)):
        out, last = run(q, k, v, g=g, beta=beta, initial_state=state, output_final_state=True)
        torch.manual_seed(1)
        loss = (out * torch.randn_like(out)).sum() + (last * torch.randn_like(last)).sum()
        results.append((out, last, *torch.autograd.grad(loss, (q, k, v, g, beta, state))))
    for got, want in zip(results[1], results[0], strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-10)


def test_a_state_reaches_the_last_segment():
    q, k, v, g, beta, state = inputs("chunk_gated_delta_rule")
    run = in_segments(TORCH.chunk_gated_delta_rule, 64)
    out, last = run(q, k, v, g=1e-3 * g, beta=1e-3 * beta, initial_state=state)
    (gradient,) = torch.autograd.grad(out[:, -1].sum(), state)
    assert gradient.abs().sum() > 0 and last is None


def test_a_short_sequence_and_other_kernels_are_left_alone():
    calls = []

    def recurrence(*args, **kwargs):
        calls.append((args, kwargs))
        return args[0], None

    x = torch.zeros(B, 64, H, K)
    assert in_segments(recurrence, 64)(x, A_log=x[0, 0])[0] is x
    assert calls[0][1]["A_log"] is not None and calls[0][1]["output_final_state"] is False
    chosen = segmented(["chunk_kda"], 64)(x)
    assert chosen.chunk_kda is not TORCH.chunk_kda
    assert chosen.chunk_gated_delta_rule is TORCH.chunk_gated_delta_rule
