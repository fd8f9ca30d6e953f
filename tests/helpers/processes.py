"""Processes of a run, found by a variable of their environment that no other run has, and never by their names."""

import contextlib
import os
import signal
import subprocess
import time
import uuid
from pathlib import Path
from subprocess import CompletedProcess, Popen

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


def find(marked: str, word: str, rank: str | None = None) -> int:
    """Return the process of a run with ``word`` on its command line, and of that rank if one is given.

    Its forks have its command line and environment: the process is the one whose parent is none of those found.
    """
    parents = {}
    for pid in alive(marked):
        with contextlib.suppress(psutil.Error):  # it has ended since
            process = psutil.Process(pid)
            if word in " ".join(process.cmdline()) and rank in (None, process.environ().get("RANK")):
                parents[pid] = process.ppid()
    for pid, parent in sorted(parents.items()):
        if parent not in parents:
            return pid
    raise AssertionError(f"no {word}: {described(alive(marked))}")


def wait_until_gone(marked: str, timeout: float = PATIENCE) -> float:
    """Return for how many seconds processes of the run lived on."""
    started = time.monotonic()
    try:
        wait_for(lambda: not alive(marked), "end of the run's processes", timeout=timeout)
    except AssertionError as error:
        raise AssertionError(f"{error}alive: {described(alive(marked))}") from None
    return time.monotonic() - started


def end(marked: str) -> None:
    """Kill the processes of a run, and those that they start meanwhile, until none is left."""

    def none_left() -> bool:
        for pid in (found := alive(marked)):
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        return not found

    wait_for(none_left, "end of killed processes")


def run(command: list, environment: dict[str, str], timeout: float = PATIENCE) -> CompletedProcess:
    """Run a command to its end. None of its processes outlives a command that takes too long."""
    marked = mark()
    try:
        return subprocess.run(list(map(str, command)), env=environment | {VARIABLE: marked}, capture_output=True,
                              text=True, timeout=timeout)  # fmt: skip
    finally:
        end(marked)


def runs(process: psutil.Process) -> bool:
    """Return whether a process lives, and not as a zombie, which its parent may never ask for."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_for_end(processes: list[psutil.Process]) -> None:
    try:
        wait_for(lambda: not any(map(runs, processes)), "end of processes")
    except AssertionError as error:
        raise AssertionError(f"{error}{described([one.pid for one in processes if runs(one)])}") from None


def below(process: Popen, word: str = "") -> list[psutil.Process]:
    """Return the processes below one that run now, those with ``word`` on their command lines."""
    found = []
    with contextlib.suppress(psutil.NoSuchProcess):
        for child in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.Error):  # it has ended since
                found += [child] if word in " ".join(child.cmdline()) else []
    return found


def kill_tree(process: Popen) -> None:
    """Kill a process and everything below it at once, as a power cut would, and wait for all of them."""
    everybody = []
    while new := [one for one in [psutil.Process(process.pid), *below(process)] if one not in everybody]:
        for one in new:  # stopped first, so that none starts another meanwhile
            with contextlib.suppress(psutil.NoSuchProcess):
                one.suspend()
        everybody += new
    for one in everybody:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    wait_for_end(everybody)
    process.communicate()
