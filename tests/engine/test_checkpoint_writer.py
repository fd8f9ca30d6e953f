"""The watch on the process that writes checkpoints: it speaks of a lost writer, and of no other."""

import os
import queue
import signal
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from helpers.waits import PATIENCE

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from hylo_megatron import train  # noqa: E402
from hylo_megatron.engine import checkpoint_writer  # noqa: E402
from hylo_megatron.engine.training_run import TrainingRun  # noqa: E402


class Process:
    """A process with the names that multiprocessing gives to a child."""

    def __init__(self):
        self.child = subprocess.Popen(["sleep", "600"])
        self.sentinel = os.pidfd_open(self.child.pid)
        self.join = self.child.wait

    exitcode = property(lambda self: self.child.poll())


class Caller:
    """Megatron's caller of a writer, as far as the watch uses it."""

    _persistent_process = None
    _persistent_queue = types.SimpleNamespace()
    _persistent_preload_q = types.SimpleNamespace()

    @classmethod
    def start(cls):
        cls._persistent_process = cls._persistent_process or Process()
        return cls._persistent_process


@pytest.fixture
def watched(monkeypatch):
    """A run, the start of its writers, the verdicts of the watch, and an event that is set when a watch has ended."""
    monkeypatch.setattr(Caller, "_persistent_process", None)
    monkeypatch.setattr(checkpoint_writer, "CAUSE_SECONDS", 0.2)
    verdicts, ended, watch = [], threading.Event(), checkpoint_writer._watch
    monkeypatch.setattr(checkpoint_writer.peers, "fail", verdicts.append)
    monkeypatch.setattr(checkpoint_writer, "_watch", lambda *args: (watch(*args), ended.set()))
    run = TrainingRun()
    start = checkpoint_writer.start_watched(classmethod(Caller.start.__func__), run).__func__
    yield run, lambda: start(Caller), verdicts, ended
    run.closing.set()
    Caller._persistent_process.child.kill()
    Caller._persistent_process.child.wait()


def test_a_writer_that_was_asked_to_end_is_not_missed(watched):
    """Not even if the next writer starts before the watch has looked."""
    run, start, verdicts, ended = watched
    first = start()
    run.closing.set()
    first.child.kill()
    Caller._persistent_process = None
    assert start() is not first
    assert ended.wait(PATIENCE) and not verdicts


def test_a_killed_writer_is_missed(watched):
    _, start, verdicts, ended = watched
    os.kill(start().child.pid, signal.SIGKILL)
    assert ended.wait(PATIENCE)
    assert len(verdicts) == 1 and "is gone (killed by SIGKILL" in verdicts[0]


def test_results_pass_through_a_process_without_torch(monkeypatch):
    monkeypatch.setitem(sys.modules, "__main__", train)  # as in a training: a spawned process imports it
    monkeypatch.setattr(sys, "argv", [train.__file__])
    results = checkpoint_writer.start_results_queue(None)
    assert checkpoint_writer.start_results_queue(results) is results
    try:
        results.put({0: torch.ones(2)})
        assert results.get_nowait()[0].tolist() == [1, 1]
        with pytest.raises(queue.Empty):
            results.get_nowait()
        assert "libtorch" in Path("/proc/self/maps").read_text()
        assert "libtorch" not in Path(f"/proc/{results.texts._manager._process.pid}/maps").read_text()
    finally:
        results.texts._manager.shutdown()
