"""Rank 0 reports a rank that is gone, however late its thread runs."""

import signal
import socket
from types import SimpleNamespace

import pytest

from hylo_megatron.engine import ending, peers


@pytest.fixture
def other(monkeypatch):
    """Rank 0's connection to another rank, and that rank's own end of it."""
    ours, theirs = socket.socketpair()
    monkeypatch.setattr(peers._Run, "others", {ours: {"rank": 1}})
    with ours, theirs:
        yield ours, theirs


def test_what_a_rank_has_sent_and_its_end_are_seen_before_they_are_read(other):
    ours, theirs = other
    assert not peers._unread(ours)
    theirs.sendall(b"{")
    assert peers._unread(ours)
    ours.recv(1)
    assert not peers._unread(ours)
    theirs.close()
    assert peers._unread(ours)
    ours.recv(1)
    assert peers._unread(ours)  # until the report: the end of a connection stays
    ours.close()
    assert peers._unread(ours)


@pytest.mark.parametrize("lost", [True, False])
def test_a_signal_ends_rank_0_after_the_report_of_a_lost_rank(lost, other, monkeypatch):
    ours, theirs = other
    happened = []

    def sleep(seconds):  # the thread that serves the others runs now
        if seconds != peers.SIGNAL_SECONDS:
            peers._Run.others.pop(ours)
            happened.append("reported")

    monkeypatch.setattr(peers, "time", SimpleNamespace(sleep=sleep, monotonic=lambda: 0.0))
    monkeypatch.setattr(peers, "leave", lambda: happened.append("left"))
    monkeypatch.setattr(peers.os, "kill", lambda *_: happened.append("ended"))
    monkeypatch.setattr(
        peers.signal, "signal", lambda number, _: number == signal.SIGCHLD and happened.append("alone")
    )
    monkeypatch.setattr(peers._Run, "pid", peers.os.getpid())
    if lost:
        theirs.close()
    peers._terminated(signal.SIGTERM, None)
    assert happened == ["alone"] + ["reported"] * lost + ["left", "ended"]


@pytest.mark.parametrize("how, waits", [("Terminated", True), ("Killed", False)])
def test_a_data_worker_that_torchrun_ends_is_not_the_cause(how, waits, monkeypatch):
    happened = []
    monkeypatch.setattr(peers._Run, "size", 2)
    monkeypatch.setattr(peers, "time", SimpleNamespace(sleep=happened.append, monotonic=lambda: 0.0))
    monkeypatch.setattr(peers, "fail", lambda text: happened.append("failed"))
    monkeypatch.setattr(peers.signal, "signal", lambda *_: happened.append("alone"))
    ending._ended_by(RuntimeError(f"DataLoader worker (pid 7) is killed by signal: {how}. "), None, None)
    assert happened == ["alone"] + [peers.NEWS_SECONDS] * waits + ["failed"]
