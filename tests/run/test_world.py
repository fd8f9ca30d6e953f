"""The ranks of a recipe under torchrun, as far as they need no torchrun."""

from types import SimpleNamespace

import pytest
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
