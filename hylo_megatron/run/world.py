"""The ranks that torchrun started: rank 0 runs the recipe, and the others start the trainings that rank 0 announces.

The ranks communicate through torchrun's own store, which works across nodes. Key ``order/N`` says what to start,
``done/N`` how many ranks have finished it, ``failed/RANK`` why a rank stopped, and ``end`` that no order follows.
"""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NoReturn

import torch
from torch.distributed import DistError, PrefixStore
from torch.distributed.rendezvous import rendezvous

from hylo_megatron.errors import HyLoError
from hylo_megatron.parent import PARENT, STORE
from hylo_megatron.run.launch import Process, Processes, child_environment

POLL_SECONDS = 0.2
REPORT_SECONDS = 30  # how long the other ranks wait for rank 0, which has to report why a rank failed
OTHERS_SECONDS = 2  # when a rank fails others fail too; in this time the rank with the cause reports it


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


def use_all_cores() -> None:
    """Let this process compute on all cores: while rank 0 converts and initialises, the other ranks wait.

    torchrun gives each rank one thread (``OMP_NUM_THREADS=1``). Any other number is the user's, and stays.
    """
    if os.environ.get("OMP_NUM_THREADS") == "1":
        torch.set_num_threads(len(os.sched_getaffinity(0)))


class World:
    """One rank's view of all ranks."""

    def __init__(self):
        self.rank, self.size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        names = ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT")
        self.prefix = "/".join(["hylo", *(os.environ.get(name, "0") for name in names)])
        store, _, _ = next(rendezvous("env://"))
        self.store, self.number = PrefixStore(self.prefix, store), 0

    def fail(self, why: str) -> None:
        self.store.set(f"failed/{self.rank}", why)
        self.store.set("failed", "1")

    def failed(self) -> bool:
        return self.store.check(["failed"])

    def why_failed(self) -> str:
        time.sleep(OTHERS_SECONDS)
        keys = [key for key in (f"failed/{rank}" for rank in range(self.size)) if self.store.check([key])]
        reasons = [self.store.get(key).decode() for key in keys]
        return next((reason for reason in reasons if "error: " in reason.lower()), reasons[0])

    def start(self, arguments: list[str], processes: Processes, log: Path) -> "Trainer":
        """Start the same training on every rank. Only rank 0 calls this."""
        self.number += 1
        self.store.set(f"order/{self.number}", json.dumps([arguments, str(log)]))
        return Trainer(self, arguments, log)

    def follow(self) -> None:
        """Do the whole work of a rank other than 0. Exits with 1 when any rank fails."""
        try:
            self._follow()
        except DistError as error:  # the store ended with its process: no further orders can come
            raise HyLoError(f"rank {self.rank}: torchrun's store is gone, so the run has ended") from error

    def _follow(self) -> None:
        while True:
            self.number += 1
            order = f"order/{self.number}"
            while not self.store.check([order]):
                if self.failed():
                    self.leave_after_the_first()
                if self.store.check(["end"]):
                    return
                time.sleep(POLL_SECONDS)
            arguments, log = json.loads(self.store.get(order))
            trainer = Trainer(self, arguments, Path(log).with_suffix(f".rank{self.rank}.log"))
            try:
                while (code := trainer.poll()) is None:
                    time.sleep(POLL_SECONDS)
            except DistError:
                trainer.process.stop(signal.SIGKILL)
                raise
            except BaseException:
                trainer.stop()
                raise
            if code:
                self.leave_after_the_first()

    def leave_after_the_first(self) -> NoReturn:
        """Exit later than rank 0: torchrun ends all ranks when one has ended, and rank 0 has to report the cause."""
        end = time.monotonic() + REPORT_SECONDS
        while not self.store.check(["failed/0"]) and time.monotonic() < end:  # rank 0 sets it before it reports
            time.sleep(POLL_SECONDS)
        time.sleep(3 * OTHERS_SECONDS)
        sys.exit(1)

    @contextmanager
    def leading(self):
        """Surround rank 0's work; the other ranks end when the work ends."""
        use_all_cores()
        try:
            yield
        except BaseException as error:
            with suppress(DistError):  # no rank is left to be told
                self.fail(str(error))
            raise
        self.store.set("end", "1")


class Trainer:
    """This rank's process of one training. It has succeeded only when the processes of all ranks have."""

    def __init__(self, world: World, arguments: list[str], log: Path):
        self.world, self.number, self.log = world, world.number, log
        self.code: int | None = None
        self.counted = False
        own = {PARENT: str(os.getpid()), STORE: f"{world.prefix}/training/{self.number}"}
        here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        self.process = Process(arguments, log, child_environment(here, **own))

    def poll(self) -> int | None:
        if self.code is not None:
            return self.code
        code, done = self.process.poll(), f"done/{self.number}"
        if code:
            where = f"rank {self.world.rank}: " if self.world.size > 1 else ""
            self.world.fail(where + self.process.reason())
        elif code == 0 and not self.counted:
            self.counted = True
            self.world.store.add(done, 1)
        if self.world.failed():
            self.process.stop(signal.SIGKILL)  # the process may be waiting for a lost rank and ignore SIGTERM
            self.code = 1
        elif self.counted and self.world.store.add(done, 0) == self.world.size:
            self.code = 0
        return self.code

    def stop(self) -> None:
        """Stop as after a signal: the training may save before it exits."""
        self.process.stop()

    def reason(self) -> str:
        return self.world.why_failed()


def exit_on_signals(signals: tuple = (signal.SIGTERM, signal.SIGINT)) -> None:
    """Turn signals into an exit, so that this process stops its children on the way out."""

    def leave(number: int, _) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in signals:
        signal.signal(each, leave)
