"""Attention within a window, in blocks, equals attention with a mask of all pairs."""

import pytest
import torch

from hylo_megatron.kernels.window import (
    PADDING,
    far_positions,
    sequence_attention,
    sequence_mask,
    window_attention,
    window_mask,
)

SIZES = [(8, 2), (5, 0), (16, 4), (64, 4), (1, 1)]


def made(length: int) -> tuple[torch.Tensor, ...]:
    torch.manual_seed(length)
    return tuple(torch.randn(2, length, heads, 8, dtype=torch.double) for heads in (6, 6, 3, 3))


def dense(q, far, k, v, window: int, sinks: int) -> torch.Tensor:
    k, v = (x.repeat_interleave(2, 2) for x in (k, v))
    at = torch.arange(q.shape[1])
    distance = at[:, None] - at
    seen = (distance >= 0) & ((distance < window) | (at < sinks))
    near_scores, far_scores = (torch.einsum("bqhk,bthk->bhqt", x, k) * q.shape[-1] ** -0.5 for x in (q, far))
    scores = torch.where(at < sinks, far_scores, near_scores)
    return torch.einsum("bhqt,bthk->bqhk", scores.masked_fill(~seen, -torch.inf).softmax(-1), v)


@pytest.mark.parametrize("window, sinks", SIZES)
@pytest.mark.parametrize("length", [1, 3, 16, 37, 64])
def test_blocks_compute_what_all_pairs_do(length, window, sinks):
    """Complete sequences with their gradients, and the last tokens of a sequence."""
    leaves = [x.requires_grad_() for x in made(length)]
    want = dense(*leaves, window, sinks)
    got = sequence_attention(*leaves, {"size": window, "sinks": sinks})
    torch.testing.assert_close(got, want)
    weight = torch.randn_like(want)
    for one, other in zip(*(torch.autograd.grad((x * weight).sum(), leaves) for x in (got, want)), strict=True):
        torch.testing.assert_close(one, other)
    q, far, k, v = leaves
    kv, at, sizes = torch.cat([k, v], -1), torch.arange(length).expand(2, -1), {"size": window, "sinks": sinks}
    for last in {1, min(7, length)}:
        mask = window_mask(at, at[:, :sinks], last, sizes, shared=2, dtype=torch.double)
        got = window_attention(q[:, -last:], far[:, -last:], kv, kv[:, :sinks], mask, sizes)
        torch.testing.assert_close(got, want[:, -last:])


def test_padding_is_not_seen_and_gives_finite_numbers():
    q, far, k, v = made(20)
    kv, at, sizes = torch.cat([k, v], -1), torch.arange(20) - 6, {"size": 5, "sinks": 2}
    at = torch.where(at < 0, PADDING, at).expand(2, -1)
    kv[:, :6] = 1e3
    mask = window_mask(at, at[:, 6:8], 20, sizes, shared=2, dtype=torch.double)
    got = window_attention(q, far, kv, kv[:, 6:8], mask, sizes)
    assert got.isfinite().all()
    torch.testing.assert_close(got[:, 6:], dense(*(x[:, 6:] for x in (q, far, k, v)), 5, 2))


@pytest.mark.parametrize("length, window, sinks", [(37, 8, 2), (64, 16, 4), (3, 5, 1)])
def test_rows_share_a_mask_and_compute_what_a_mask_for_each_row_does(length, window, sinks):
    leaves, sizes = [x.requires_grad_() for x in made(length)], {"size": window, "sinks": sinks}
    at = torch.arange(length).expand(2, -1)
    apart = window_mask(at, at[:, :sinks], length, sizes, shared=2, dtype=torch.double)
    shared = sequence_mask(leaves[0], 3, sizes)
    assert 2 * shared.numel() == apart.numel() and torch.equal(shared.repeat(2, 1, 1, 1), apart)
    one, other = (sequence_attention(*leaves, sizes, mask) for mask in (shared, apart))
    assert torch.equal(one, other)
    for pair in zip(*(torch.autograd.grad(x.square().sum(), leaves) for x in (one, other)), strict=True):
        assert torch.equal(*pair)


def test_memory_grows_with_the_window_not_with_the_square():
    masks = [
        window_mask(at, at[:, :4], length, {"size": 16, "sinks": 4}, shared=1, dtype=torch.float)
        for length in (256, 512)
        for at in [torch.arange(length).expand(1, -1)]
    ]
    assert masks[1].numel() == 2 * masks[0].numel() <= 512 * 48


def test_sinks_are_no_further_away_than_the_window_and_they_are_wide():
    at = far_positions(torch.tensor([0, 5, 8, 9, 10, 100_000]), {"size": 8, "sinks": 2})
    assert at.tolist() == [0, 5, 8, 9, 9, 9]
