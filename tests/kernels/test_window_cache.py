"""Requests that are read in chunks and tokens, from caches that others have used, give what complete sequences do.

``test_window_decode.py`` runs some of these tests in Triton's interpreter, with the kernel for tokens.
"""

import os
import subprocess
import sys

import pytest
import torch
from helpers.paths import PROGRAMS, ROOT
from torch.utils._python_dispatch import TorchDispatchMode

from hylo_megatron.kernels import window_cache
from hylo_megatron.kernels.window import sequence_attention
from hylo_megatron.kernels.window_cache import ChunkPlan, TokenPlan
from hylo_megatron.kernels.window_decode import TokenKernel

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
Tokens, DTYPE = (TokenKernel, torch.float) if INTERPRETED else (TokenPlan, torch.double)
CLOSE = dict(rtol=1e-4, atol=1e-5) if INTERPRETED else {}
SIZES = [(8, 2), (5, 0), (16, 4), (1, 1), (3, 4)]
GROUPS, SHARED, DIM, SLOTS = 2, 3, 8, 6
LENGTHS = {1: 35, 2: 8, 3: 62, 5: 3}  # tokens of the requests, by slot
# Of each pass: the slots that decode, and (slot, tokens) of the chunks.
PASSES = [
    ((), [(1, 5)]),
    ((1,), [(3, 40)]),
    ((1,), [(2, 1), (3, 2)]),
    ((1, 2), [(5, 2), (3, 1)]),
    ((2, 1, 5, 3), []),
    ((), [(1, 25), (2, 4), (3, 17)]),
    ((1, 2, 3), []),
]


def sequences() -> dict[int, list[torch.Tensor]]:
    torch.manual_seed(0)
    heads = (GROUPS * SHARED, GROUPS * SHARED, GROUPS, GROUPS)
    return {slot: [torch.randn(n, h, DIM, dtype=DTYPE) for h in heads] for slot, n in LENGTHS.items()}


def served(plan, cache, parts: list[list[torch.Tensor]]) -> torch.Tensor:
    q, far, k, v = (torch.cat(each) for each in zip(*parts, strict=True))
    return plan.attend(q, far, torch.cat([k, v], -1), cache)


@pytest.mark.parametrize("queries, rows", [(3, 30), (3, 1000), (256, 1), (256, 1 << 16)])
@pytest.mark.parametrize("size, sinks", SIZES)
def test_chunks_and_tokens_of_several_requests(size, sinks, queries, rows, monkeypatch):
    monkeypatch.setattr(window_cache, "QUERIES", queries)
    monkeypatch.setattr(window_cache, "ROWS", rows)
    given, window, done = sequences(), {"size": size, "sinks": sinks}, dict.fromkeys(LENGTHS, 0)
    want = {slot: sequence_attention(*(x[None] for x in parts), window)[0] for slot, parts in given.items()}
    page = torch.full((SLOTS, 7 + GROUPS * (sinks + size) * 2 * DIM), torch.nan, dtype=DTYPE)
    cache = page[:, 7:].unflatten(1, (GROUPS, sinks + size, 2 * DIM))  # a part of a page, as vLLM has it
    kinds = dict(shared=SHARED, dtype=DTYPE)

    def step(given_out: list[tuple[int, int]], chunks: bool) -> None:
        spans = [(slot, slice(done[slot], done[slot] + tokens)) for slot, tokens in given_out]
        at = torch.cat([torch.arange(here.start, here.stop) for _, here in spans])
        slots = torch.tensor([slot for slot, _ in spans], dtype=torch.int32)
        starts = torch.tensor([0, *(tokens for _, tokens in given_out)]).cumsum(0).int()
        plan = ChunkPlan.of(at, starts, slots, window, **kinds) if chunks else Tokens.of(at, slots, window, **kinds)
        got = served(plan, cache, [[x[here] for x in given[slot]] for slot, here in spans])
        torch.testing.assert_close(got, torch.cat([want[slot][here] for slot, here in spans]), **CLOSE)
        done.update({slot: here.stop for slot, here in spans})

    for slots, chunks in PASSES:
        if slots:
            step([(slot, 1) for slot in slots], chunks=False)
        if chunks:
            step(chunks, chunks=True)
    assert done == LENGTHS


def test_padding_of_a_graph_and_requests_without_tokens_change_nothing_else():
    window, kinds = {"size": 4, "sinks": 1}, dict(shared=SHARED, dtype=DTYPE)
    cache = torch.randn(SLOTS, GROUPS, 5, 2 * DIM, dtype=DTYPE)
    before, parts = cache.clone(), [x[:3] for x in sequences()[1]]
    one = Tokens.of(torch.tensor([7, 0, 900]), torch.tensor([2, 0, -1]), window, **kinds)
    assert served(one, cache, [parts]).isfinite().all()
    assert cache[[1, 3, 4, 5]].equal(before[[1, 3, 4, 5]]) and not cache[2].equal(before[2])
    before = cache.clone()
    plan = ChunkPlan.of(torch.arange(3), torch.tensor([0, 3, 3, 3]), torch.tensor([4, 0, 0]), window, **kinds)
    assert served(plan, cache, [parts]).isfinite().all()
    assert cache[[0, 1, 2, 3, 5]].equal(before[[0, 1, 2, 3, 5]]) and not cache[4].equal(before[4])


@pytest.mark.skipif(not torch.backends.cuda.is_built(), reason="stands for a GPU in a build of torch for GPUs")
def test_nothing_waits_for_the_gpu():
    """A CUDA graph takes in decoded tokens, and chunks leave the host ahead of the GPU."""
    command = [sys.executable, "-W", "ignore", str(PROGRAMS / "window_syncs.py")]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert not done.returncode, done.stderr[-2000:]


class Largest(TorchDispatchMode):
    """The values of the largest tensor that was made."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        made = [x for x in (out if isinstance(out, (list, tuple)) else [out]) if isinstance(x, torch.Tensor)]
        self.values = max([self.values, *(x.untyped_storage().nbytes() // x.element_size() for x in made)])
        return out


def test_many_short_prompts_take_little_more_memory_than_a_long_one(monkeypatch):
    """vLLM measures one prompt of all tokens before it gives the rest of the memory to caches."""
    monkeypatch.setattr(window_cache, "ROWS", 1 << 10)
    window, tokens, found = {"size": 128, "sinks": 4}, 2048, []
    cache = torch.zeros(1, GROUPS, 132, 2 * DIM)
    q, kv = torch.randn(tokens, GROUPS * SHARED, DIM), torch.randn(tokens, GROUPS, 2 * DIM)
    for requests in (1, 256):
        starts = torch.arange(requests + 1) * (tokens // requests)
        with Largest() as largest:
            slots = torch.zeros(requests, dtype=torch.int64)
            plan = ChunkPlan.of(torch.arange(tokens), starts, slots, window, shared=SHARED, dtype=q.dtype)
            plan.attend(q, q, kv, cache)
        found.append(largest.values)
    assert found[1] < 2 * found[0]
