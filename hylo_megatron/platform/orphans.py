"""A helper process must not outlive the one it helps. No heavy imports: every helper process imports this."""

import multiprocessing
import os
import threading
from multiprocessing.connection import wait


def _wait_for(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def end_with_parent() -> None:
    """This process ends when the one that asked for it does, however that ends.

    The kernel's own signal (PR_SET_PDEATHSIG) will not do: a writer's parent is the fork server, which lives as long
    as any of its children.
    """
    sentinel = multiprocessing.parent_process().sentinel
    threading.Thread(target=_wait_for, args=(sentinel,), daemon=True).start()
