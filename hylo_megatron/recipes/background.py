"""Work beside the main thread of a run: data and evaluations do not wait for training where there is a GPU."""

import contextlib
import multiprocessing
from collections.abc import Callable
from pathlib import Path

import torch

from hylo_megatron.errors import HyLoError


def _run(action: Callable[[], object], log: Path) -> None:
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        action()


class Background:
    """Runs actions (which have to be picklable) in processes of their own; on a CPU each is waited for at once."""

    def __init__(self, logs: Path):
        self.logs, self.beside = logs, torch.cuda.is_available()
        self.running: dict[str, multiprocessing.process.BaseProcess] = {}

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def start(self, name: str, action: Callable[[], object]) -> None:
        context = multiprocessing.get_context("spawn")
        self.running[name] = context.Process(target=_run, args=(action, self._log(name)))
        self.running[name].start()
        if not self.beside:
            self.wait(name)

    def wait(self, *names: str) -> None:
        """For these, or for all. Raises ``HyLoError`` for one that failed."""
        for name in names or list(self.running):
            process = self.running.pop(name, None)
            if process is None:
                continue
            process.join()
            if process.exitcode:
                last = [line for line in self._log(name).read_text(errors="replace").splitlines() if line.strip()][-1:]
                raise HyLoError(f"{name} failed: {' '.join(last) or process.exitcode}; see {self._log(name)}")

    def stop(self) -> None:
        for process in self.running.values():
            process.terminate()
