"""What a training process is told by the one that started it, through two environment variables."""

import ctypes
import os
import signal
import sys

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
