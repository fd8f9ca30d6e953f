"""What the guard takes for a spike, a burst and a divergence, and what a resumed run knows of the interrupted one."""

import math

import pytest

from hylo_megatron.checkpoint import guard_state
from hylo_megatron.distill.spikes import LEAST, ROLLBACKS, SKIPS, WINDOW, Spikes, SpikeSettings
from hylo_megatron.errors import HyLoError


def steady(steps: int, **settings) -> Spikes:
    spikes = Spikes(settings=SpikeSettings(**settings))
    for _ in range(steps):
        assert spikes.judge(2.0, 1.0) is None and spikes.took(2.0, 1.0, updated=True) is None
    return spikes


def test_a_spike_is_far_above_the_median():
    assert steady(LEAST - 1).judge(1000.0, 1.0) is None  # too few to compare with
    assert steady(LEAST).judge(5.9, 1.0) is None
    assert "loss 6.1 is 3.0 times the median 2 of the last 10 steps" in steady(LEAST).judge(6.1, 1.0)
    assert steady(LEAST, factor=4.0).judge(6.1, 1.0) is None
    for loss, norm in ((math.nan, 1.0), (math.inf, 1.0), (2.0, math.nan)):
        assert steady(0).judge(loss, norm)
    assert steady(LEAST).judge(2.0, None) is None


def test_a_burst_is_of_the_norm():
    assert steady(LEAST).burst(9.9) is None and steady(LEAST).burst(None) is None
    assert "gradient norm 11 is 11.0 times" in steady(LEAST).burst(11.0)


def test_what_counts_as_diverged():
    spikes = steady(WINDOW)
    rise = [spikes.took(6.5, 1.0, updated=True) for _ in range(WINDOW)]
    assert rise[0] is None and "has risen from 2 to 6.5" in rise[-1]
    spikes = steady(WINDOW)
    spikes.restart()  # the loss has other weights: no rise
    assert not any(spikes.took(6.5, 1.0, updated=True) for _ in range(WINDOW))
    spikes = steady(WINDOW)
    skips = [spikes.took(math.nan, 1.0, updated=False) for _ in range(SKIPS)]
    assert skips[-2] is None and f"{SKIPS} steps in a row" in skips[-1]
    spikes = steady(WINDOW)
    spikes.rollbacks = ROLLBACKS
    assert spikes.took(math.nan, 1.0, updated=False) is None
    spikes.rollbacks += 1
    assert "rollbacks did not help" in spikes.took(math.nan, 1.0, updated=False)


def test_a_resumed_run_knows_what_the_interrupted_one_knew(tmp_path):
    first, second = steady(WINDOW - 1), Spikes(settings=SpikeSettings())
    first.took(math.nan, 0.1, updated=False)
    first.rollbacks = 2
    assert first.known()["lowest"] is None  # infinity is no JSON
    for loss in (0.1 + 0.2, 1 / 3):
        first.took(loss, loss, updated=True)
    guard_state.write(tmp_path, 60, first.known() | {"loss": {"name": "KL"}, "phase": [False]})
    second.resume(guard_state.read(tmp_path, 60))
    assert second == first and second.losses.maxlen == WINDOW and len(second.losses) == WINDOW


def test_states_of_the_guard_go_with_their_checkpoints(tmp_path, capsys):
    state = Spikes(settings=SpikeSettings()).known() | {"loss": {}, "phase": []}
    for iteration in (4, 8):
        guard_state.write(tmp_path, iteration, state)
        (tmp_path / f"iter_{iteration:07d}").mkdir()
    (tmp_path / "iter_0000004").rmdir()
    guard_state.write(tmp_path, 12, state)
    assert [path.name for path in sorted((tmp_path / "guard").iterdir())] == [
        "iter_0000008.json", "iter_0000012.json"]  # fmt: skip
    assert guard_state.read(tmp_path, 4) is None and capsys.readouterr().err == ""
    (tmp_path / "guard" / "iter_0000008.json").write_text('{"losses": [1')
    assert guard_state.read(tmp_path, 8) is None
    assert "iter_0000008.json: not valid JSON" in capsys.readouterr().err


def test_factors_are_above_one():
    for name, field in (("spike", "factor"), ("burst", "burst")):
        with pytest.raises(HyLoError, match=f"--hylo-{name}-factor 1.0: expected a number above 1"):
            SpikeSettings(**{field: 1.0})
