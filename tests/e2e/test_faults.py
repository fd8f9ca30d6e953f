"""A rank is killed at a random moment, again and again; the same command goes on, and the losses do not show it.

``make test`` kills twice, ``pytest -m parallel`` twenty times.
"""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
import psutil  # noqa: E402
from helpers import train as helpers  # noqa: E402

from hylo_megatron.checkpoint import iterations  # noqa: E402

SEED, SAVE_EVERY = 20260, 3
SLOWEST = 600  # seconds without what a kill waits for; a start takes 20 on two idle cores
LAYOUTS = {"tp2": dict(tensor_model_parallel_size=2), "dp2": {}}


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.random_world(tmp_path_factory.mktemp("faults"))


class Run:
    """A run of two processes under torchrun, and the command that starts it or goes on with it."""

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
        assert process.wait(SLOWEST) == 0, self.output.read_text(errors="replace")[-4000:]
        return self.losses()

    def losses(self) -> list[tuple]:
        """All that a step logs but how long it took."""
        lines = helpers.read_log(self.folder / "train_log.jsonl")
        return [tuple(value for key, value in line.items() if key != "seconds") for line in lines]

    def steps_logged(self) -> int:
        log = self.folder / "train_log.jsonl"
        return log.read_bytes().count(b"\n") if log.is_file() else 0

    def being_saved(self) -> bool:
        return any(not iterations.is_complete(path) for path in self.folder.glob("iter_*[0-9]"))


class Moments:
    """When to kill: in the middle of saving (half of them), some steps on, or while starting."""

    def __init__(self, run: Run, draw: random.Random):
        self.run, self.draw = run, draw

    def kinds(self, kills: int) -> list[str]:
        kinds = ["saving", "training", "saving", "starting"] * kills
        return kinds[:kills]

    def wait_for(self, kind: str, process: subprocess.Popen) -> None:
        before, deadline = self.run.steps_logged(), time.monotonic() + SLOWEST
        steps, saves, changed = self.draw.randint(2, 2 * SAVE_EVERY), self.draw.randint(1, 2), False
        started, delay = time.monotonic(), self.draw.uniform(0, 10)
        while process.poll() is None and time.monotonic() < deadline:
            now = self.run.being_saved() if kind == "saving" else False
            saves -= now and not changed
            changed = now
            if kind == "saving" and now and saves <= 0:
                return time.sleep(self.draw.uniform(0, 0.5))
            # Going on starts by dropping the lines after the checkpoint.
            if kind == "training" and self.run.steps_logged() not in (before, 0):
                time.sleep(self.draw.uniform(0, 0.1 * steps))
                return None
            if kind == "starting" and time.monotonic() - started > delay:
                return None
            time.sleep(0.002)
        pytest.fail(f"no moment of {kind} in {process.args}: " + self.run.output.read_text(errors="replace")[-4000:])


def kill_one(process: subprocess.Popen, draw: random.Random) -> float:
    """Kills a rank; returns how long torchrun and everything it started took to end."""
    launcher = psutil.Process(process.pid)
    ranks = []
    while len(ranks) < 2 and process.poll() is None:  # torchrun may not have come so far
        ranks = launcher.children()
        time.sleep(0.01)
    everybody = launcher.children(recursive=True)
    started = time.monotonic()
    os.kill(draw.choice(ranks).pid, signal.SIGKILL)
    assert process.wait(SLOWEST) != 0
    gone, alive = psutil.wait_procs(everybody, timeout=60)
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
