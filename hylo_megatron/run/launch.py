"""Start the processes of one training, and report why a process stopped."""

import functools
import math
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

import hylo_megatron
from hylo_megatron.checkpoint import disk
from hylo_megatron.config.layout import ParallelLayout
from hylo_megatron.errors import HyLoError
from hylo_megatron.parent import ALONE, PARENT, STORE, bind_child
from hylo_megatron.recipes.stage import Stage

LEAST_FREE = 2**20  # bytes; with less free space, a log may lack the line with the error
ONE_RANK = ParallelLayout()


@dataclass(frozen=True, kw_only=True)
class Processes:
    """The processes of a training: ``dp`` copies of the model, each shared by the ranks of ``layout``.

    ``cuda_graph``: whether a training runs its step as one CUDA graph; None: where each GPU has the whole model.
    Raises ``HyLoError`` if True where ranks share a model.
    """

    layout: ParallelLayout = ONE_RANK
    dp: int = 1
    cuda_graph: bool | None = None

    def __post_init__(self):
        if self.cuda_graph and self.layout.ranks > 1:
            raise HyLoError(f"--cuda-graph: not where ranks share a model ({self}); leave it out")

    @classmethod
    def found(cls, layout: ParallelLayout = ONE_RANK, cuda_graph: bool | None = None) -> "Processes":
        """Return one process for each GPU of this machine, or without GPUs one copy of the model."""
        ranks = torch.cuda.device_count() or layout.ranks
        return cls.among(ranks, "GPUs here", layout, cuda_graph)

    @classmethod
    def among(cls, ranks: int, what: str, layout: ParallelLayout, cuda_graph: bool | None = None) -> "Processes":
        """Return as many copies of the model as ``ranks`` allow. ``what`` names the ranks in an error message."""
        if ranks % layout.ranks:
            context = f" x CP {layout.cp}" if layout.cp > 1 else ""
            sizes = f"TP {layout.tp} x PP {layout.pp}{context}"
            raise HyLoError(
                f"{sizes} = {layout.ranks} ranks do not divide the {ranks} {what}; take sizes whose product does"
            )
        return cls(layout=layout, dp=ranks // layout.ranks, cuda_graph=cuda_graph)

    @property
    def ranks(self) -> int:
        return self.layout.ranks * self.dp

    @property
    def one_graph(self) -> bool:
        return self.layout.ranks == 1 if self.cuda_graph is None else self.cuda_graph

    def fit(self, stage: Stage) -> Stage:
        """Return ``stage`` as each model copy trains it (``Stage.among``). Raises ``HyLoError`` as ``fit_all``."""
        return self.fit_all([stage])[0]

    def fit_all(self, stages: Sequence[Stage]) -> list[Stage]:
        """Return the stages as each model copy trains them.

        Raises ``HyLoError`` if the copies cannot have equal numbers of sequences in each stage.
        """
        for stage in stages:
            if stage.global_batch % self.dp:
                times = math.lcm(*(self.dp // math.gcd(self.dp, each.global_batch) for each in stages))
                raise HyLoError(
                    f"stage {stage.name}: {self.dp} copies of the model cannot share a batch of {stage.global_batch}"
                    f" sequences equally; use fewer GPUs (CUDA_VISIBLE_DEVICES), or {times} times the batch:"
                    f" --batch-factor {times} where the recipe has that flag, or {times} times the one that is given"
                )
        return [stage.among(self.dp) for stage in stages]

    def __str__(self) -> str:
        at = self.layout
        return f"TP {at.tp} PP {at.pp} " + (f"CP {at.cp} " if at.cp > 1 else "") + f"DP {self.dp}"


def child_environment(ranks_here: int, **changes: str) -> dict[str, str]:
    """Return a child's environment: its share of the cores, and this package, installed or not, on PYTHONPATH."""
    inherited = {name: value for name, value in os.environ.items() if name not in (PARENT, STORE)}
    package = str(Path(hylo_megatron.__file__).parent.parent)
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    threads = str(max(1, (os.cpu_count() or 1) // ranks_here))
    own = {"OMP_NUM_THREADS": threads, "CUDA_DEVICE_MAX_CONNECTIONS": "1", "PYTHONPATH": os.pathsep.join(paths)}
    return inherited | own | changes


class Process:
    """A running command that appends its output to ``log``. It dies with the thread that started it."""

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
        """Return in one line why the process failed: its own error, not the error of an earlier run."""
        code = self.popen.returncode
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        with self.log.open(errors="replace") as file:
            file.seek(self.begin)
            errors = [line.strip() for line in file if "error: " in line.lower()]
        if not errors and disk.free(self.log) < LEAST_FREE:
            return disk.line(self.log, None)
        return errors[-1] if errors else f"exit code {code}"


def start_own(arguments: list[str], processes: Processes, log: Path) -> Process:
    """Start all ranks on this machine, as one process or with torchrun."""
    if processes.ranks > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes.ranks)]
        return Process([*launcher, *arguments], log, child_environment(processes.ranks))
    # One process needs no torchrun, whose import of torch takes seconds. With port 0 the process listens on a port
    # that is free when it starts; a port that is free now may be taken by then.
    return Process(arguments, log, child_environment(1, **ALONE, **{PARENT: str(os.getpid())}))
