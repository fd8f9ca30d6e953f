"""Trainings as forks of programs/zygote.py, which one process of tests starts once."""

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

from helpers.paths import PROGRAMS
from helpers.waits import PATIENCE, wait_for


class Zygote:
    """The process of programs/zygote.py. ``errors`` has what it says of itself, and not of its trainings."""

    def __init__(self, environment: dict[str, str]):
        self.scratch = tempfile.TemporaryDirectory()
        self.errors = Path(self.scratch.name) / "errors"
        command = [sys.executable, "-W", "ignore", str(PROGRAMS / "zygote.py")]
        with self.errors.open("w") as file:
            self.process = subprocess.Popen(command, env=environment, stdin=subprocess.PIPE,
                                            stdout=file, stderr=file)  # fmt: skip
        self.trainings = 0

    def running(self) -> bool:
        return self.process.poll() is None

    def gone(self) -> AssertionError:
        return AssertionError(f"the process that forks trainings is gone: {self.errors.read_text()[-4000:]}")

    def order(self, **order) -> None:
        try:
            self.process.stdin.write(json.dumps(order).encode() + b"\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            raise self.gone() from None

    def start(self, argv: list, environment: dict[str, str], out: Path, err: Path) -> "Training":
        self.trainings += 1
        code = Path(self.scratch.name) / str(self.trainings)
        self.order(argv=list(map(str, argv)), environment=environment, out=str(out), err=str(err), code=str(code))
        return Training(self, code)


class Training:
    """A training that the zygote was asked for. Its exit code is in a file."""

    def __init__(self, zygote: Zygote, file: Path):
        self.zygote, self.file = zygote, file

    def poll(self) -> int | None:
        running = self.zygote.running()  # before the last look, so that no code is missed
        if self.file.exists():
            return int(self.file.read_text())
        if not running:  # and with it all of its trainings
            raise self.zygote.gone()
        return None

    def send(self, what: signal.Signals) -> None:
        if self.poll() is None:
            self.zygote.order(code=str(self.file), signal=int(what))

    def wait(self, timeout: float = PATIENCE) -> int:
        """Return the exit code. A training that goes on for ``timeout`` seconds is killed."""
        try:
            wait_for(lambda: self.poll() is not None, "end of a training", timeout=timeout)
        except AssertionError:
            self.send(signal.SIGKILL)
            wait_for(lambda: self.poll() is not None, "end of a killed training")
        return self.poll()


_started: list[Zygote] = []


def zygote(environment: dict[str, str]) -> Zygote:
    """Return the zygote of this process of tests, or another one if the first has ended."""
    if not _started or not _started[-1].running():
        _started.append(Zygote(environment))
    return _started[-1]
