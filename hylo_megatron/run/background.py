"""Work beside the main thread of a run: on a GPU, training does not wait for data preparation and evaluation."""

import contextlib
import multiprocessing
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from hylo_megatron.errors import HyLoError
from hylo_megatron.parent import bind_forks, end_with_parent


def _run(action: Callable[[], object], log: Path) -> None:
    with log.open("a") as file, contextlib.redirect_stdout(file), contextlib.redirect_stderr(file):
        action()


def _run_beside(action: Callable[[], object], log: Path) -> None:
    end_with_parent()
    bind_forks()
    try:
        _run(action, log)
    except BaseException:
        with log.open("a") as file:
            traceback.print_exc(file=file)
        sys.exit(1)


class Background:
    """Runs picklable actions in processes of their own on a GPU. On a CPU an action runs at once in this process."""

    def __init__(self, logs: Path, beside: bool | None = None):
        self.logs, self.beside = logs, torch.cuda.is_available() if beside is None else beside
        self.running: dict[str, multiprocessing.process.BaseProcess] = {}

    def _log(self, name: str) -> Path:
        return self.logs / f"{name}.log"

    def start(self, name: str, action: Callable[[], object]) -> None:
        if not self.beside:
            _run(action, self._log(name))
            return
        context = multiprocessing.get_context("spawn")
        self.running[name] = context.Process(target=_run_beside, args=(action, self._log(name)))
        self.running[name].start()

    def wait(self, *names: str) -> None:
        """Wait for these actions, or for all. Raises ``HyLoError`` for an action that failed."""
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
