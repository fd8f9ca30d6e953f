"""Processes of a run, found by a variable of their environment that no other run has, and never by their names."""

import contextlib
import os
import signal
import time
import uuid
from pathlib import Path
from subprocess import Popen

import psutil
from helpers.waits import PATIENCE, wait_for

VARIABLE = "HYLO_TEST_RUN"


def mark() -> str:
    return uuid.uuid4().hex


def alive(marked: str) -> list[int]:
    """Return the processes of a run. A zombie is none of them: the kernel shows no environment of it."""
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


def wait_until_gone(marked: str, timeout: float) -> float:
    """Return for how many seconds processes of the run lived on."""
    started = time.monotonic()
    try:
        wait_for(lambda: not alive(marked), "end of the run's processes", timeout=timeout)
    except AssertionError as error:
        raise AssertionError(f"{error}alive: {described(alive(marked))}") from None
    return time.monotonic() - started


def end(marked: str) -> None:
    for pid in alive(marked):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)


def kill_tree(process: Popen) -> None:
    """Kill a process and everything below it at once, as a power cut would, and wait for all of them."""
    top = psutil.Process(process.pid)
    everybody = [*top.children(recursive=True), top]
    for one in everybody:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    _, left = psutil.wait_procs(everybody, timeout=PATIENCE)
    process.communicate()
    assert not left, described([one.pid for one in left])
