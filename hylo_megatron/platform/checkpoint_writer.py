"""The processes that checkpoints are written through: they end with their trainer, and run without a GPU too.

megatron-core's queue of results is a process of its own; where a trainer is killed (SIGKILL, or torchrun's SIGTERM to
the other ranks) it stays behind for ever. ``--async-save`` brings a writer as well, which asks for a GPU
(``async_utils.py:565``): without one it dies, and the trainer, which does not look, waits for ever.
"""

import atexit
import os
import sys
import threading
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager

import torch
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async

from hylo_megatron.platform import cpu
from hylo_megatron.platform.parent import end_with_parent

_write = async_utils.PersistentAsyncCaller.async_loop


def start_results_queue() -> None:
    """What the engine's ``get_write_results_queue`` makes at the first save, now, and bound to this process."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=torch.multiprocessing.get_context("spawn"))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()


def writer(*args):
    """Runs in the writer's process."""
    end_with_parent()
    if cpu.needed():
        cpu.install()
        torch.cuda.device_count = lambda: 1
    _write(*args)


def _watch(process, closing: threading.Event) -> None:
    wait([process.sentinel])
    if not closing.is_set():
        print("error: the process that writes checkpoints is gone: start again", file=sys.stderr, flush=True)
        os._exit(2)


def install() -> None:
    caller = async_utils.PersistentAsyncCaller
    start, close = caller._get_process.__func__, caller.close
    closing = threading.Event()
    atexit.register(closing.set)

    def start_watched(cls, *args, **kwargs):
        known = cls._persistent_process
        process = start(cls, *args, **kwargs)
        if process is not known:
            closing.clear()
            threading.Thread(target=_watch, args=(process, closing), daemon=True).start()
        return process

    def close_watched(self, abort=False):
        if self.process:
            closing.set()
        close(self, abort)

    caller.async_loop = staticmethod(writer)
    caller._get_process, caller.close = classmethod(start_watched), close_watched
