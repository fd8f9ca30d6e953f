"""What benchmarks of trainings share: processes that end with a measurement, step logs, results of earlier calls."""

import fcntl
import json
import os
import signal
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import read_json

MARK = "HYLO_BENCH_STEP"  # a variable in the environment of the processes of one measurement
GONE_SECONDS = 60


def marked(mark: str) -> list[int]:
    """Return the processes with this mark, also those that have lost their parents."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if wanted in path.read_bytes().split(b"\0"):
                found.append(int(path.parent.name))
    return found


@contextmanager
def processes_ended() -> Iterator[None]:
    """Mark the processes that the block starts, and kill those that outlive the block."""
    os.environ[MARK] = mark = uuid.uuid4().hex
    try:
        yield
    finally:
        del os.environ[MARK]
        deadline = time.monotonic() + GONE_SECONDS
        while left := marked(mark):
            if time.monotonic() > deadline:
                raise RuntimeError(f"processes {left} of the last measurement do not end, and hold their GPUs")
            for number in left:
                with suppress(ProcessLookupError):
                    os.kill(number, signal.SIGKILL)
            time.sleep(0.1)


@contextmanager
def one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait until no other process is in such a block for this folder. The lock ends with the process."""
    number = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(number, fcntl.LOCK_EX)
        yield
    finally:
        os.close(number)


def step_lines(path: Path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def results_before(path: Path, results: str, settings: dict, kept_in: str = "") -> list[dict]:
    """Return the list ``results`` that an earlier call has left in a file, [] if there is no file.

    Raises ``HyLoError`` if the file has other ``settings``: at its top, or in its object ``kept_in``.
    """
    if not path.is_file():
        return []
    found = read_json(path)
    before = found[kept_in] if kept_in else found
    for name, value in settings.items():
        if before.get(name) != value:
            raise HyLoError(
                f"{path}: {name} is {before.get(name)}, this run has {value}; give another --out, or move the file"
            )
    return found[results]
