"""A rank is killed at a random moment, ten times for each layout; the same command goes on with equal losses.

Only ``make test-parallel`` runs this file. ``make test`` kills a training in distill/test_train.py, and
whole recipes in test_recipes.py and test_examples.py.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
import psutil  # noqa: E402
from helpers import train as helpers  # noqa: E402
from helpers.waits import PATIENCE, lines_of, wait_for  # noqa: E402

from hylo_megatron.checkpoint import iterations  # noqa: E402

SEED, SAVE_EVERY = 20260, 3
LAYOUTS = {"tp2": dict(tensor_model_parallel_size=2), "dp2": {}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.random_world(tmp_path_factory.mktemp("faults"))


class Run:
    """A run of two processes under torchrun; one command starts and resumes it."""

    def __init__(self, world, folder: Path, steps: int, layout: str):
        self.folder, self.output = folder, folder.with_suffix(".output")
        self.argv = helpers.train_flags(world, "distill", folder, train_iters=steps, save_interval=SAVE_EVERY,
                                        **LAYOUTS[layout])  # fmt: skip

    def start(self, *flags: str) -> subprocess.Popen:
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
        command = [*launcher, "-m", "hylo_megatron.train", *map(str, self.argv), *flags]
        with self.output.open("a") as output:
            return subprocess.Popen(command, env=helpers.environment(), stdout=output, stderr=output)

    def finish(self, *flags: str) -> list[tuple]:
        process = self.start(*flags)
        assert process.wait(PATIENCE) == 0, self.output.read_text(errors="replace")[-4000:]
        return self.losses()

    def losses(self) -> list[tuple]:
        """Return all that a step logs, except how long it took."""
        lines = helpers.read_log(self.folder / "train_log.jsonl")
        return [tuple(value for key, value in line.items() if key != "seconds") for line in lines]

    def steps_logged(self) -> int:
        return lines_of(self.folder / "train_log.jsonl")

    def being_saved(self) -> bool:
        return any(not iterations.is_complete(path) for path in self.folder.glob("iter_*[0-9]"))


class Moments:
    """Moments for a kill: half of them during a save, the others after some steps or during the start."""

    def __init__(self, run: Run, draw: random.Random):
        self.run, self.draw = run, draw

    def kinds(self, kills: int) -> list[str]:
        kinds = ["saving", "training", "saving", "starting"] * kills
        return kinds[:kills]

    def wait_for(self, kind: str, process: subprocess.Popen) -> None:
        moment = {"saving": self._save_begins, "training": self._has_gone_on, "starting": self._is_late_enough}[kind]()
        wait_for(lambda: next(moment), f"moment of {kind}", process=process, output=self.run.output, every=0.002)
        time.sleep({
            "saving": self.draw.uniform(0, 0.5),
            "training": self.draw.uniform(0, 0.1) * self.draw.randint(2, 2 * SAVE_EVERY), "starting": 0,
        }[kind])  # fmt: skip

    def _save_begins(self) -> Iterator[bool]:
        """Yield whether the first, or the second, save from now has begun."""
        saves, before = self.draw.randint(1, 2), False
        while True:
            now = self.run.being_saved()
            saves -= now and not before
            before = now
            yield now and saves <= 0

    def _has_gone_on(self) -> Iterator[bool]:
        """Yield whether the log has changed. A resumed run first drops the lines after its checkpoint."""
        before = self.run.steps_logged()
        while True:
            yield self.run.steps_logged() not in (before, 0)

    def _is_late_enough(self) -> Iterator[bool]:
        deadline = time.monotonic() + self.draw.uniform(0, 10)
        while True:
            yield time.monotonic() > deadline


def kill_one(process: subprocess.Popen, draw: random.Random) -> float:
    """Kill a rank, and return how long torchrun and everything below it took to end."""
    launcher = psutil.Process(process.pid)
    wait_for(lambda: len(launcher.children()) >= 2, "two ranks", process=process)
    ranks = launcher.children()
    everybody = launcher.children(recursive=True)
    started = time.monotonic()
    os.kill(draw.choice(ranks).pid, signal.SIGKILL)
    assert process.wait(PATIENCE) != 0
    gone, alive = psutil.wait_procs(everybody, timeout=PATIENCE)
    assert not alive, [one.cmdline() for one in alive]
    return time.monotonic() - started


def kill_and_go_on(world, folder: Path, layout: str, kills: int) -> None:
    draw, steps = random.Random(f"{SEED} {layout}"), 4 * kills + 12
    whole = Run(world, folder / "whole", steps, layout).finish()
    assert len(whole) == steps
    run = Run(world, folder / "killed", steps, layout)
    moments = Moments(run, draw)
    for number, kind in enumerate(moments.kinds(kills)):
        flags = ("--async-save",) * (number % 4 < 2) + ("--hylo-keep-last", "2") * (number % 2)
        process = run.start(*flags)
        try:
            moments.wait_for(kind, process)
            saving = run.being_saved()
            seconds = kill_one(process, draw)
        finally:
            process.kill()
        tracked = run.folder / iterations.TRACKER
        named = tracked.read_text() if tracked.exists() else "nothing"
        assert named == "nothing" or iterations.trained_to(run.folder, int(named))
        print(f"KILLED {layout} {number}: {kind}, {'half a checkpoint there, ' * saving}tracker {named},"
              f" {run.steps_logged()} steps logged, all gone after {seconds:.1f} s", flush=True)  # fmt: skip
    assert run.finish("--async-save") == whole
    shutil.rmtree(run.folder)


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("layout", LAYOUTS)
def test_ten_killed_ranks_do_not_show(layout, world, tmp_path):
    kill_and_go_on(world, tmp_path, layout, 10)
