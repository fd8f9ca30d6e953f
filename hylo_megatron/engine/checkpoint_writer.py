"""How checkpoints are written: no failure of a writer makes a trainer wait, and each says file, need and free space.

What megatron-core 0.19.2 waits for without end, and what is done here. Where several threads write, the failure of one
ends the writer's process before it answers (``filesystem_async.py:291``); a writer that is killed answers nothing
(``async_utils.py:424, 462, 507``); a request that cannot be pickled, such as one whose tensors do not fit into shared
memory, is dropped by the queue's thread; a trainer that fails waits at its exit for a dead writer (``__del__``). The
queue of results is a process of its own, which a killed trainer leaves behind, as it does a writer. The writer also
asks for a GPU (``async_utils.py:565``).
"""

import os
import queue
import signal
import threading
import time
import traceback
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from typing import NoReturn

import torch
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from torch.distributed.checkpoint.api import _wrap_exception

from hylo_megatron.checkpoint import disk
from hylo_megatron.engine import cpu, peers
from hylo_megatron.errors import HyLoError
from hylo_megatron.run.parent import end_with_parent

CAUSE_SECONDS = 2  # torchrun ends writers too when a rank is lost: time for the line that says which
CLOSING_SECONDS = 20
_Writer = filesystem_async.FileSystemWriterAsync
_write, _write_bucket = async_utils.PersistentAsyncCaller.async_loop, _Writer.write_preloaded_data
_write_buckets, _results = _Writer.write_preloaded_data_multithread, _Writer.retrieve_write_results
_failures: list[Exception] = []  # of the save that this process is writing


def start_results_queue() -> None:
    """What the engine's ``get_write_results_queue`` makes at the first save, now, and bound to this process."""
    if filesystem_async._results_queue is None:
        manager = SyncManager(ctx=torch.multiprocessing.get_context("spawn"))
        manager.start(end_with_parent)
        filesystem_async._results_queue = manager.Queue()


# ---- writing: in the trainer, or in the writer's process ----


def _size(bucket) -> int:
    _, _, (texts, tensors) = bucket
    return sum(data.getbuffer().nbytes for _, data in texts) + sum(tensor.nbytes for _, tensor in tensors)


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or "no message").splitlines()[0]


def _said(error: Exception, bucket) -> Exception:
    file = bucket[0]
    full = disk.explained(error, file, _size(bucket))
    return full or HyLoError(f"{file}: cannot be written: {type(error).__name__}: {_first_line(error)}")


def write_bucket(transforms, *, local_proc_idx, write_bucket, results_queue, count_queue, **how):
    """The engine's ``write_preloaded_data`` for one file. A failure goes to ``_failures``."""
    try:
        _, result = _write_bucket(transforms, local_proc_idx=local_proc_idx, write_bucket=write_bucket,
                                  results_queue=None, count_queue=None, **how)  # fmt: skip
    except Exception as error:
        result = error
    if isinstance(result, Exception):
        _failures.append(_said(result, write_bucket))
        disk.drop_tracebacks(result)
        result = []
    if results_queue is not None:
        results_queue.put((local_proc_idx, result))
    if count_queue is not None:
        count_queue.get()
        count_queue.task_done()
    return local_proc_idx, result


def write_buckets(transforms, use_msc, rank, write_buckets, results) -> None:
    """The engine's ``write_preloaded_data_multithread``, which here always answers: results, or an exception."""
    _failures.clear()
    answer = queue.Queue()
    try:
        _write_buckets(transforms, use_msc, rank, write_buckets, answer)
        result = answer.get_nowait()
    except Exception as error:
        result = error
    results.put(_failures[0] if _failures else result)


def retrieve_results(self):
    """The engine's, with the writer's own error instead of one that quotes it."""
    found = _results(self)
    error = found[0] if isinstance(found, tuple) else None
    return _wrap_exception(error.__cause__) if error and isinstance(error.__cause__, HyLoError) else found


def _install_writing() -> None:
    _Writer.write_preloaded_data = staticmethod(write_bucket)
    _Writer.write_preloaded_data_multithread = staticmethod(write_buckets)
    _Writer.retrieve_write_results = retrieve_results


def writer(*args):
    """Runs in the writer's process."""
    end_with_parent()
    _install_writing()
    if cpu.needed():
        cpu.install()
        torch.cuda.device_count = lambda: 1
    try:
        _write(*args)
    except (ConnectionError, EOFError, FileNotFoundError):  # of the queue of results: the trainer is ending
        os._exit(1)
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # at its own exit a process of multiprocessing waits for its queues


# ---- the trainer's side ----


def _watch(process, closing: threading.Event, folder: str | None, need: int) -> None:
    wait([process.sentinel])
    time.sleep(CAUSE_SECONDS)
    if closing.is_set():
        return
    process.join(1)
    code = process.exitcode or 0
    how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    if folder and disk.free(folder) < need:  # torch's zip writer sometimes crashes on a full disk (SIGSEGV)
        peers.fail(disk.line(folder, need, f"no space left, and the process that writes checkpoints is gone ({how})"))
    peers.fail(f"the process that writes checkpoints is gone ({how}; SIGKILL: out of memory?); {peers.AGAIN}")


def _not_sent(error: Exception, _) -> NoReturn:
    """Called by the thread of a queue whose item cannot be sent."""
    traceback.print_exception(error)
    peers.fail(f"a checkpoint cannot be handed to its writer ({_first_line(error)}); is /dev/shm full?"
               f" {disk.text(disk.free('/dev/shm'))} is free there")  # fmt: skip


def _close(caller, closing: threading.Event) -> None:
    """Ends an idle writer. One that does not answer is killed."""
    closing.set()
    shared = async_utils.PersistentAsyncCaller
    if caller.process.is_alive():
        shared._persistent_queue.put("DONE")
        caller.process.join(CLOSING_SECONDS)
    caller.process.kill()
    caller.process = shared._persistent_process = None
    shared._persistent_queue = shared._persistent_preload_q = shared._persistent_comp_q = None


def install(folder: str | None = None, need: int = 0) -> None:
    """``folder``: where checkpoints go; ``need``: bytes of one."""
    caller = async_utils.PersistentAsyncCaller
    start = caller._get_process.__func__
    closing = threading.Event()

    def start_watched(cls, *args, **kwargs):
        known = cls._persistent_process
        process = start(cls, *args, **kwargs)
        if process is not known:
            closing.clear()
            for each in (cls._persistent_queue, cls._persistent_preload_q):
                each._on_queue_feeder_error = _not_sent
            threading.Thread(target=_watch, args=(process, closing, folder, need), daemon=True).start()
        return process

    def close(self, abort=False):
        if self.process:
            _close(self, closing)

    _install_writing()
    caller.async_loop = staticmethod(writer)
    caller._get_process, caller.close = classmethod(start_watched), close
