"""Tests that no process outlives its run: each level is killed in turn, and everything below it ends too.

``make test`` kills a real training under torchrun, and trees of light processes that are started as recipes start
theirs; ``pytest -m parallel`` kills whole recipes too.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from helpers import processes

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
if sys.platform != "linux":
    pytest.skip("the kernel's signal at a parent's death is Linux's", allow_module_level=True)
from helpers import train as helpers  # noqa: E402
from helpers.waits import PATIENCE, lines_of, wait_for  # noqa: E402

from hylo_megatron.serve.demo import held_port  # noqa: E402

TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]


class Tree:
    """The processes of a run, which are killed at the end of the test whatever happens."""

    def __init__(self, command: list, output: Path, **variables):
        self.mark, self.output = processes.mark(), output
        environment = helpers.environment(**{processes.VARIABLE: self.mark, **variables})
        with output.open("w") as file:
            self.top = subprocess.Popen(list(map(str, command)), env=environment, stdout=file, stderr=file)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        processes.end(self.mark)
        self.top.wait()

    def wait_for(self, condition, what: str):
        return wait_for(condition, what, process=self.top, output=self.output, every=0.05)

    def find(self, word: str, rank: str | None = None) -> int:
        return processes.find(self.mark, word, rank)

    def kill(self, pid: int) -> float:
        """Return how long all others lived on. ``top`` is waited for, so that no zombie of it stays."""
        os.kill(pid, signal.SIGKILL)
        started = time.monotonic()
        self.top.wait(PATIENCE)
        processes.wait_until_gone(self.mark)
        return time.monotonic() - started


# ---- trees of light processes, started as a recipe starts its own ----

PROGRAM = """
import functools, sys, time
from pathlib import Path

CHILD = '''
import multiprocessing, os, pathlib, sys, time
from hylo_megatron.parent import bind_forks, die_with_parent, end_with_parent
from multiprocessing.managers import SyncManager
if __name__ == "__main__":
    die_with_parent()
    bind_forks()
    multiprocessing.get_context("fork").Process(target=time.sleep, args=(36000,)).start()
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with_parent)
    pathlib.Path(sys.argv[1], "trainer" + os.environ["RANK"]).touch()
    time.sleep(36000)
'''

if __name__ == "__main__":
    from hylo_megatron.parent import bind_forks, die_with_parent
    from hylo_megatron.run.background import Background
    from hylo_megatron.run.launch import Processes, start_own
    from hylo_megatron.run.world import World, exit_on_signals
    die_with_parent()
    bind_forks()
    exit_on_signals()
    folder, how = Path(sys.argv[1]), sys.argv[2]
    child = folder / "child.py"
    if how == "alone":
        child.write_text(CHILD)
        background = Background(folder, beside=True)
        background.start("evaluation", functools.partial(time.sleep, 36000))
        process = start_own([str(child), str(folder)], Processes(dp=2), folder / "log")
        while process.poll() is None:
            time.sleep(0.1)
        sys.exit(3)
    world = World()
    if world.rank:
        world.follow()
    else:
        child.write_text(CHILD)
        with world.leading():
            process = world.start([str(child), str(folder)], Processes(dp=2), folder / "log")
            while process.poll() is None:
                time.sleep(0.1)
            raise SystemExit(process.reason())
"""


def light_tree(folder: Path, how: str) -> Tree:
    folder.mkdir()
    program = folder / "program.py"
    program.write_text(PROGRAM)
    launcher = [sys.executable] if how == "alone" else TORCHRUN
    return Tree([*launcher, program, folder, how], folder / "output")


def ready(tree: Tree, folder: Path, ranks: str = "01"):
    return tree.wait_for(lambda: all((folder / f"trainer{rank}").exists() for rank in ranks), "trainers")


def test_every_level_killed(tmp_path):
    """Kill torchrun, the recipe of rank 0, and a trainer; and a recipe by itself, which has a torchrun of its own."""
    with (
        light_tree(tmp_path / "a", "torchrun") as torchrun, light_tree(tmp_path / "b", "torchrun") as recipe,
        light_tree(tmp_path / "c", "torchrun") as trainer, light_tree(tmp_path / "d", "alone") as alone,
    ):  # fmt: skip
        ready(torchrun, tmp_path / "a")
        torchrun.kill(torchrun.top.pid)
        ready(recipe, tmp_path / "b")
        recipe.kill(recipe.find("program.py", rank="0"))
        ready(trainer, tmp_path / "c")
        os.kill(trainer.find("child.py", rank="1"), signal.SIGKILL)
        trainer.top.wait(PATIENCE)
        processes.wait_until_gone(trainer.mark)
        assert "rank 1: killed by SIGKILL" in trainer.output.read_text()
        ready(alone, tmp_path / "d")
        assert alone.find("child.py", rank="1") and alone.find("spawn_main")
        alone.kill(alone.top.pid)


def test_a_run_by_itself_outlives_its_shell(tmp_path):
    """A run goes on after a logout: it does not follow the process that started torchrun, or the training itself."""
    program = (
        "import os, time, sys\nfrom hylo_megatron.parent import die_with_parent\ndie_with_parent()\n"
        "open(sys.argv[1], 'w').close()\nwhile os.path.exists(sys.argv[1]): time.sleep(0.05)\n"
        "open(sys.argv[1] + '.end', 'w').close()\n"
    )
    there = tmp_path / "there"
    tree = Tree(["bash", "-c", f'"{sys.executable}" -c "$0" {there} & wait', program], tmp_path / "output")
    with tree:
        tree.wait_for(there.exists, "start")
        tree.top.kill()
        tree.top.wait()  # the kernel has sent its signal by now, if the run has asked for it
        there.unlink()
        processes.wait_until_gone(tree.mark)
        assert (tmp_path / "there.end").exists()


# ---- real trainings of two ranks, with the processes that write checkpoints ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.random_world(tmp_path_factory.mktemp("death"))


def training(world, folder: Path, **flags) -> Tree:
    argv = helpers.train_flags(world, "distill", folder, train_iters=100000, save_interval=3, hylo_keep_last=1,
                               async_save=True, num_workers=2, **flags)  # fmt: skip
    return Tree([*TORCHRUN, "-m", "hylo_megatron.train", *argv], folder.with_suffix(".output"))


def trained(tree: Tree, log: Path, step: int) -> None:
    tree.wait_for(lambda: lines_of(log) >= step, f"step {step} in {log}")


def errors(output: Path) -> list[str]:
    return [line for line in output.read_text(errors="replace").splitlines() if line.startswith("error: ")]


def test_a_lost_rank_and_a_lost_torchrun(world, tmp_path):
    with training(world, tmp_path / "torchrun") as torchrun, training(world, tmp_path / "rank") as rank:
        trained(torchrun, tmp_path / "torchrun" / "train_log.jsonl", 4)
        assert len(processes.alive(torchrun.mark)) > 3 * 2  # each rank has a queue, a writer, and data workers
        torchrun.kill(torchrun.top.pid)
        trained(rank, tmp_path / "rank" / "train_log.jsonl", 4)
        lost = rank.find("hylo_megatron.train", rank="1")
        rank.kill(lost)
    said = errors(rank.output)
    assert len(said) == 1, rank.output.read_text(errors="replace")[-3000:]
    assert said[0].startswith(f"error: rank 1 (process {lost} on ")
    assert "the same command goes on from the last checkpoint" in said[0]


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("lost", ["writer", "queue", "rank 0"])
def test_helpers_and_rank_0_lost(lost, world, tmp_path):
    """Without torchrun, as under SLURM's srun, only the ranks themselves see that one of them is gone."""
    holder, trees = held_port(), []
    port, folder = str(holder.getsockname()[1]), tmp_path / "run"
    argv = helpers.train_flags(world, "distill", folder, train_iters=100000, save_interval=3, async_save=True)
    for number in "01":
        variables = dict(RANK=number, LOCAL_RANK=number, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port,
                         SLURM_STEP_ID="0", SLURM_PROCID=number)  # fmt: skip
        trees.append(Tree(helpers.train_command(*argv), tmp_path / f"output{number}", **variables))
    with holder, trees[0] as zero, trees[1] as one:
        trained(zero, folder / "train_log.jsonl", 4)
        children = psutil.Process(zero.top.pid).children(recursive=True)
        victims = {
            "writer": lambda: max(children, key=lambda child: child.memory_info().rss).pid,
            "queue": lambda: next(c.pid for c in children if "spawn_main" in " ".join(c.cmdline())),
            "rank 0": lambda: zero.top.pid,
        }
        os.kill(victims[lost](), signal.SIGKILL)
        began = time.monotonic()
        for tree in trees:
            assert tree.top.wait(PATIENCE) != 0
            processes.wait_until_gone(tree.mark)
        print(f"LOST {lost}: all gone after {time.monotonic() - began:.1f} s")
    said = [*errors(zero.output), *errors(one.output)]
    assert len(said) == 1, said
    if lost != "queue":
        assert {"writer": "writes checkpoints is gone", "rank 0": "rank 0 (process"}[lost] in said[0]


# ---- whole recipes ----

EXAMPLE = helpers.ROOT / "examples" / "upcycle_llama1b.sh"


@pytest.mark.slow
@pytest.mark.parallel
@pytest.mark.parametrize("level", ["torchrun", "rank 0", "trainer", "bash", "bash's trainer"])
def test_recipes_killed_at_every_level(level, tmp_path):
    out = tmp_path / "run"
    command = ["bash", EXAMPLE] if "bash" in level else [*TORCHRUN, EXAMPLE]
    with Tree(command, tmp_path / "output", PROXY="1", STEPS="1000", OUT=str(out), PYTHON=sys.executable,
              FLAGS="--async-save") as tree:  # fmt: skip
        trained(tree, out / "ild" / "train_log.jsonl", 4)
        victim = {
            "torchrun": lambda: tree.top.pid, "rank 0": lambda: tree.find(EXAMPLE.name, rank="0"),
            "trainer": lambda: tree.find("hylo_megatron.train", rank="1"), "bash": lambda: tree.top.pid,
            "bash's trainer": lambda: tree.find("hylo_megatron.train"),
        }[level]()  # fmt: skip
        print(f"KILLED {level}: all gone after {tree.kill(victim):.1f} s", flush=True)
    if "trainer" in level:
        assert len([line for line in errors(tree.output) if "stopped" in line]) == 1
    assert json.loads((out / "recipe.json").read_text())
