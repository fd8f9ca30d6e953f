"""The ranks of a recipe under torchrun, as far as they need no torchrun."""

import os
from types import SimpleNamespace

import pytest
import torch
from torch.distributed import HashStore

from hylo_megatron.run import world


@pytest.fixture
def rank_1(monkeypatch):
    """Rank 1 with a store, and a clock that sleeping moves. ``reports_at``: when rank 0 says why the run ends."""
    rank, clock = object.__new__(world.World), SimpleNamespace(now=0.0, reports_at=None)
    rank.store, rank.rank = HashStore(), 1

    def sleep(seconds):
        clock.now += seconds
        if clock.reports_at is not None and clock.now >= clock.reports_at:
            rank.store.set("failed/0", "why")

    monkeypatch.setattr(world, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: clock.now))
    return rank, clock


@pytest.mark.parametrize("reports_at", [0.0, 20.0, None], ids=["at once", "late", "never"])
def test_a_rank_leaves_after_rank_0_has_reported(rank_1, reports_at):
    rank, clock = rank_1
    clock.reports_at = reports_at
    with pytest.raises(SystemExit):
        rank.leave_after_the_first()
    least = world.REPORT_SECONDS if reports_at is None else reports_at
    assert least < clock.now <= least + 3 * world.OTHERS_SECONDS + 2 * world.POLL_SECONDS
    assert clock.now - least >= 3 * world.OTHERS_SECONDS


@pytest.mark.parametrize("given, threads", [("1", 3), ("2", 1)], ids=["torchrun's", "the user's"])
def test_rank_0_computes_on_all_cores_unless_the_user_says_how_many(given, threads, monkeypatch):
    before = torch.get_num_threads()
    monkeypatch.setenv("OMP_NUM_THREADS", given)
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: {0, 1, 2})
    leader = object.__new__(world.World)
    leader.store = HashStore()
    torch.set_num_threads(1)
    try:
        with leader.leading():
            assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
