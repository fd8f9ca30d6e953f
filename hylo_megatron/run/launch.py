"""Starts the processes of one training: how many there are, their environment, and why one stopped."""

import functools
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

import hylo_megatron
from hylo_megatron.checkpoint import disk
from hylo_megatron.errors import HyLoError
from hylo_megatron.run.parent import PARENT, STORE, bind_child

LEAST_FREE = 2**20  # bytes: with less on its disk a log may lack the line that says why


@dataclass(frozen=True)
class Layout:
    """How many processes train, and how they share the model. ``dp`` is what the GPUs at hand leave."""

    tp: int
    pp: int
    dp: int
    cuda_graph: bool = True  # of one GPU's training step
    cp: int = 1

    @classmethod
    def found(cls, tp: int, pp: int, cuda_graph: bool = True, cp: int = 1) -> "Layout":
        """For the GPUs of this machine; without any, as many processes as the model is split into."""
        return cls.of(torch.cuda.device_count() or tp * pp * cp, "GPUs here", tp, pp, cuda_graph, cp)

    @classmethod
    def of(cls, ranks: int, what: str, tp: int, pp: int, cuda_graph: bool, cp: int) -> "Layout":
        if ranks % (tp * pp * cp):
            context = f" x CP {cp}" if cp > 1 else ""
            raise HyLoError(f"TP {tp} x PP {pp}{context} = {tp * pp * cp} ranks do not divide the {ranks} {what}")
        return cls(tp, pp, ranks // (tp * pp * cp), cuda_graph, cp)

    @property
    def ranks(self) -> int:
        return self.tp * self.pp * self.cp * self.dp

    def flags(self) -> list[str]:
        sizes = ["--tensor-model-parallel-size", str(self.tp), "--pipeline-model-parallel-size", str(self.pp)]
        return sizes + (["--context-parallel-size", str(self.cp)] if self.cp > 1 else [])

    def __str__(self) -> str:
        return f"TP {self.tp} PP {self.pp} " + (f"CP {self.cp} " if self.cp > 1 else "") + f"DP {self.dp}"


def child_environment(ranks_here: int, **changes: str) -> dict[str, str]:
    """This process's, with its share of the cores, and this very package even where it is not installed."""
    inherited = {name: value for name, value in os.environ.items() if name not in (PARENT, STORE)}
    package = str(Path(hylo_megatron.__file__).parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(max(1, (os.cpu_count() or 1) // ranks_here))
    own = {"OMP_NUM_THREADS": threads, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return inherited | own | changes


class Process:
    """A running command whose output goes to the end of ``log``. It dies with the thread that started it."""

    def __init__(self, arguments: list[str], log: Path, environment: dict[str, str]):
        with log.open("a") as output:
            self.log, self.begin = log, output.tell()
            self.popen = subprocess.Popen([sys.executable, *arguments], stdout=output, stderr=subprocess.STDOUT,
                                          env=environment,
                                          preexec_fn=functools.partial(bind_child, os.getpid()))  # fmt: skip

    def poll(self) -> int | None:
        return self.popen.poll()

    def stop(self, how: signal.Signals = signal.SIGTERM) -> None:
        self.popen.send_signal(how)
        self.popen.wait()

    def reason(self) -> str:
        """Why it failed, in one line, from what it wrote itself and not an earlier run into the same file."""
        code = self.popen.returncode
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        with self.log.open(errors="replace") as file:
            file.seek(self.begin)
            errors = [line.strip() for line in file if "error: " in line.lower()]
        if not errors and disk.free(self.log) < LEAST_FREE:
            return disk.line(self.log, None)
        return errors[-1] if errors else f"exit code {code}"


def start_own(arguments: list[str], layout: Layout, log: Path) -> Process:
    """All ranks on this machine: one process, or a torchrun of our own."""
    if layout.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(layout.ranks)]
        return Process([*launcher, *arguments], log, child_environment(layout.ranks))
    # The launcher would import torch only to start one process. Port 0: whichever is free when the process listens;
    # one that was free now may be taken by then.
    alone = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    return Process(arguments, log, child_environment(1, **alone, **{PARENT: str(os.getpid())}))
