"""The ranks that torchrun started: rank 0 runs the recipe, the others start the trainings that it tells them about.

They speak through torchrun's own store, which works across nodes: ``order/N`` is what to start, ``done/N`` how many
ranks came to its end, ``failed/RANK`` why a rank stopped, ``end`` that nothing follows.
"""

import json
import os
import signal
import sys
import time
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed import DistError, PrefixStore
from torch.distributed.rendezvous import rendezvous

from hylo_megatron.errors import HyLoError
from hylo_megatron.run.launch import Process, Processes, child_environment
from hylo_megatron.run.parent import PARENT, STORE

POLL_SECONDS = 0.2
OTHERS_SECONDS = 2  # a rank that fails pulls others down with it: time for the one with the cause to say it


def under_torchrun() -> bool:
    return "TORCHELASTIC_RUN_ID" in os.environ and "RANK" in os.environ


class World:
    """This rank's view of all of them."""

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
        """Rank 0's: the same training on every rank."""
        self.number += 1
        self.store.set(f"order/{self.number}", json.dumps([arguments, str(log)]))
        return Trainer(self, arguments, log)

    def follow(self) -> None:
        """The other ranks' whole work. Exits with 1 when any rank fails."""
        try:
            self._follow()
        except DistError as error:  # the store went with its process: nobody will tell what to do
            raise HyLoError(f"rank {self.rank}: torchrun's store is gone, and so is its run") from error

    def _follow(self) -> None:
        while True:
            self.number += 1
            order = f"order/{self.number}"
            while not self.store.check([order]):
                if self.failed():
                    leave_after_the_first()
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
                leave_after_the_first()

    @contextmanager
    def leading(self):
        """Around rank 0's work: the others end when it does."""
        try:
            yield
        except BaseException as error:
            with suppress(DistError):  # nobody is there to be told
                self.fail(str(error))
            raise
        self.store.set("end", "1")


def leave_after_the_first() -> None:
    """torchrun ends all ranks when one has: rank 0 needs the time to say why."""
    time.sleep(3 * OTHERS_SECONDS)
    sys.exit(1)


class Trainer:
    """This rank's process of one training; it ended well only when every rank's did."""

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
            self.process.stop(signal.SIGKILL)  # it may wait for a rank that is gone, deaf to SIGTERM
            self.code = 1
        elif self.counted and self.world.store.add(done, 0) == self.world.size:
            self.code = 0
        return self.code

    def stop(self) -> None:
        """As after a signal: the training may save before it goes."""
        self.process.stop()

    def reason(self) -> str:
        return self.world.why_failed()


def exit_on_signals(signals: tuple = (signal.SIGTERM, signal.SIGINT)) -> None:
    """Signals become an exit, so that what this process started is stopped on the way out."""

    def leave(number: int, _) -> None:
        for each in signals:
            signal.signal(each, signal.SIG_IGN)
        sys.exit(128 + number)

    for each in signals:
        signal.signal(each, leave)
