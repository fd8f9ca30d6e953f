"""One way to wait for what another process does."""

import time
from collections.abc import Callable
from pathlib import Path
from subprocess import Popen
from typing import TypeVar

Found = TypeVar("Found")
PATIENCE = 900  # seconds: far beyond what a start takes on a busy machine, so that only a hang reaches it


def wait_for(condition: Callable[[], Found], what: str, *, process: Popen | None = None, output: Path | None = None,
             timeout: float = PATIENCE, every: float = 0.02) -> Found:  # fmt: skip
    """Return the first true value of ``condition``.

    Fails after ``timeout`` seconds, or once ``process`` has ended without it; the message shows the end of ``output``.
    """
    deadline = time.monotonic() + timeout
    while True:
        ended = process is not None and process.poll() is not None  # before the last look, so that none is missed
        if found := condition():
            return found
        if ended or time.monotonic() > deadline:
            how = f"the process ended with {process.returncode}" if ended else f"{timeout:.0f} s have passed"
            printed = output.read_text(errors="replace")[-4000:] if output else ""
            raise AssertionError(f"no {what}: {how}\n{printed}")
        time.sleep(every)


def lines_of(log: Path) -> int:
    """Return how many lines a log has, 0 if it does not exist yet."""
    return log.read_bytes().count(b"\n") if log.is_file() else 0
