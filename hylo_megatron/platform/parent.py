"""A process and the one that started it: what it is told through the environment, and that it does not outlive it.

No heavy imports: every helper process imports this.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait

PARENT, STORE = "HYLO_PARENT", "HYLO_STORE"
PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """A run that is killed leaves no training behind: two would write one folder once it is started again."""
    parent = os.environ.get(PARENT)
    if not parent or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):
        sys.exit("the process that started this one is gone")


def _wait_for(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def end_with_parent() -> None:
    """As ``die_with_parent``, for a process of ``multiprocessing``.

    The kernel's own signal will not do there: a writer's parent is the fork server, which lives as long as any of its
    children.
    """
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=_wait_for, args=(sentinel,), daemon=True).start()


def own_store():
    """Where the ranks of this training meet: torchrun's store, under a prefix that no other training uses.

    None: megatron makes a store as it always does. A second one on the same port, or the keys of an earlier training
    in the same store, would break the process groups of this one.
    """
    prefix = os.environ.get(STORE)
    if not prefix:
        return None
    from torch.distributed import PrefixStore, TCPStore

    return PrefixStore(prefix, TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False))
