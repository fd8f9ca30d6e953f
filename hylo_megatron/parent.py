"""Helpers for child processes: read settings from the parent's environment, and exit when the parent exits.

Linux kills a process with the thread that forked the process if the process asks for that (``PR_SET_PDEATHSIG``).
Children do not inherit the request, so each process of a run repeats it: recipe, torchrun, trainers and their workers.
Every helper process imports this module, which therefore imports nothing heavy.
"""

import ctypes
import multiprocessing
import os
import signal
import sys
import threading
from multiprocessing.connection import wait

import hylo_megatron
from hylo_megatron.errors import HyLoError

PARENT, STORE = "HYLO_PARENT", "HYLO_STORE"
# What torchrun sets, for one process that is started without it. Port 0 stands for any free one.
ALONE = dict(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
# What srun and mpirun say of the tasks that they started, whose ranks they do not set.
TASKS = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
PR_SET_PDEATHSIG = 1
GONE = "the process that started this one is gone"
# Parents that wait for their child. A shell is no such parent: a run continues when its user logs out.
LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_STEP_ID")  # torchrun's ranks, srun's tasks

_libc = ctypes.CDLL(None) if sys.platform == "linux" else None


def _die_with(parent: int) -> bool:
    """Ask the kernel for SIGKILL when ``parent`` ends. False when it has ended already."""
    if _libc is None:
        return True
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    return os.getppid() == parent


def die_with_parent() -> None:
    """End this process when its launcher ends. Otherwise two runs would write one folder after a kill and a restart.

    The launcher is the process named by ``HYLO_PARENT``, or a torchrun or srun.
    """
    if name := os.environ.get(PARENT):
        parent = int(name)
    elif any(variable in os.environ for variable in LAUNCHERS):
        parent = hylo_megatron.STARTED_BY  # the present parent may have taken over from the launcher
    else:
        return
    if not _die_with(parent):
        sys.exit(GONE)


def bind_child(parent: int) -> None:
    """End a child of ``parent`` with the parent's thread, whatever program the child runs. Used as ``preexec_fn``."""
    if not _die_with(parent):
        os._exit(1)


def bind_forks() -> None:
    """Make every process that is forked from now on die with this one: data workers, writers of checkpoints.

    Forks of other threads than the main one are left alone, because the kernel would end them with their thread.
    """
    before = {}

    def remember() -> None:
        before.update(main=threading.current_thread() is threading.main_thread(), pid=os.getpid())

    def bind() -> None:
        if before["main"]:
            bind_child(before["pid"])

    os.register_at_fork(before=remember, after_in_child=bind)


def _wait_for(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def end_with_parent() -> None:
    """End this process of ``multiprocessing`` with the process that asked for it.

    The kernel's signal does not help here: the parent of a writer is the fork server, which lives as long as any of
    its children.
    """
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=_wait_for, args=(sentinel,), daemon=True).start()


def without_launcher() -> None:
    """Make this process the only rank if no launcher has set one of the variables by which ranks find each other.

    Raises ``HyLoError`` for one of several tasks of srun or mpirun: each of them would train alone.
    """
    if ALONE.keys() & os.environ.keys():
        return
    for name in TASKS:
        if (tasks := os.environ.get(name, "1")) != "1":
            raise HyLoError(
                f"{name} is {tasks}, and no task has a RANK: each would train alone; start torchrun on each node, or"
                f" set {', '.join(ALONE)} for each task"
            )
    os.environ.update(ALONE)


def own_store():
    """Return the store where the ranks of this training meet: torchrun's, under a prefix that no other training uses.

    With None megatron makes a store of its own. A second store on the same port, or the keys of an earlier training in
    the same store, would break the process groups of this training.
    """
    prefix = os.environ.get(STORE)
    if not prefix:
        return None
    from torch.distributed import PrefixStore, TCPStore

    return PrefixStore(prefix, TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False))
