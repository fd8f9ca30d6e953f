"""Processes of a run, found by a variable of their environment that no other run has: names would match others'."""

import contextlib
import os
import signal
import time
import uuid
from pathlib import Path

import psutil

VARIABLE = "HYLO_TEST_RUN"


def mark() -> str:
    return uuid.uuid4().hex


def alive(marked: str) -> list[int]:
    """Of a process that has ended and was not waited for, the kernel shows no environment."""
    wanted, found = f"{VARIABLE}={marked}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


def described(pids: list[int]) -> list[str]:
    lines = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            lines.append(f"{pid} of {psutil.Process(pid).ppid()}: {' '.join(psutil.Process(pid).cmdline())[:200]}")
    return lines


def seconds_until_gone(marked: str, timeout: float) -> float:
    started = time.monotonic()
    while left := alive(marked):
        waited = time.monotonic() - started
        assert waited < timeout, f"alive after {waited:.0f} s: {described(left)}"
        time.sleep(0.05)
    return time.monotonic() - started


def end(marked: str) -> None:
    for pid in alive(marked):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
