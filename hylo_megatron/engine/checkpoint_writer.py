"""Writes of checkpoints: no failure of a writer makes a trainer wait, and each names file, need and free space.

megatron-core 0.19.2 waits without end in these cases. Where several threads write, the failure of one ends the
writer's process before it answers (``filesystem_async.py:291``). A writer that is killed answers nothing
(``async_utils.py:424, 462, 507``). The queue's thread drops a request that cannot be pickled, such as one whose
tensors do not fit into shared memory. A trainer that fails waits at its exit for a dead writer (``__del__``). The
queue of results is a process of its own, which a killed trainer leaves behind, as it does a writer.
"""

import multiprocessing
import os
import pickle
import queue
import signal
import threading
import time
import traceback
from multiprocessing.connection import wait
from multiprocessing.managers import SyncManager
from typing import NoReturn

from torch.distributed.checkpoint.api import _wrap_exception

from hylo_megatron.checkpoint import disk
from hylo_megatron.engine import peers
from hylo_megatron.engine.patch import around, entries, instead
from hylo_megatron.engine.register import install, original
from hylo_megatron.engine.training_run import TrainingRun
from hylo_megatron.errors import HyLoError, first_line
from hylo_megatron.parent import end_with_parent

CAUSE_SECONDS = 2  # torchrun ends writers too when a rank is lost: time for the line that names the rank
CLOSING_SECONDS = 20
_STRATEGIES = "megatron.core.dist_checkpointing.strategies"
_WRITER = f"{_STRATEGIES}.filesystem_async:FileSystemWriterAsync"
_CALLER = f"{_STRATEGIES}.async_utils:PersistentAsyncCaller"
_failures: list[Exception] = []  # of the save that this process is writing


class Results:
    """The queue of results. Its process has bytes of them, for which it need not import torch."""

    def __init__(self, texts):
        self.texts = texts

    def put(self, result) -> None:
        self.texts.put(pickle.dumps(result))

    def get_nowait(self):
        return pickle.loads(self.texts.get_nowait())


def start_results_queue(known):
    """Return the queue of results, which megatron makes at the first save, in a process that is bound to this one."""
    if known is not None:
        return known
    manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
    manager.start(end_with_parent)
    return Results(manager.Queue())


# ---- writing: in the trainer, or in the writer's process ----


def _size(bucket) -> int:
    _, _, (texts, tensors) = bucket
    return sum(data.getbuffer().nbytes for _, data in texts) + sum(tensor.nbytes for _, tensor in tensors)


def _said(error: Exception, bucket) -> Exception:
    file = bucket[0]
    full = disk.explained(error, file, _size(bucket))
    return full or HyLoError(f"{file}: cannot be written: {type(error).__name__}: {first_line(error)}")


def write_bucket(transforms, *, local_proc_idx, write_bucket, results_queue, count_queue, **how):
    """Write one file as megatron's ``write_preloaded_data`` does. A failure goes to ``_failures``."""
    write = original(f"{_WRITER}.write_preloaded_data")
    try:
        _, result = write(transforms, local_proc_idx=local_proc_idx, write_bucket=write_bucket, results_queue=None,
                          count_queue=None, **how)  # fmt: skip
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
    """Write as megatron's ``write_preloaded_data_multithread`` does, and always answer: results, or an exception."""
    _failures.clear()
    answer = queue.Queue()
    try:
        original(f"{_WRITER}.write_preloaded_data_multithread")(transforms, use_msc, rank, write_buckets, answer)
        result = answer.get_nowait()
    except Exception as error:
        result = error
    results.put(_failures[0] if _failures else result)


@around
def with_own_error(retrieve, run, self):
    """Return the writer's own error in place of one that quotes it."""
    found = retrieve(self)
    error = found[0] if isinstance(found, tuple) else None
    return _wrap_exception(error.__cause__) if error and isinstance(error.__cause__, HyLoError) else found


def writer(*args):
    """Run in the writer's process in place of megatron's ``async_loop``."""
    end_with_parent()
    install("writing")
    try:
        original(f"{_CALLER}.async_loop")(*args)
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
    peers.fail(f"a checkpoint cannot be handed to its writer ({first_line(error)}); is /dev/shm full?"
               f" {disk.text(disk.free('/dev/shm'))} is free there")  # fmt: skip


def _close(caller, closing: threading.Event) -> None:
    """End an idle writer. One that does not answer is killed."""
    closing.set()
    shared = type(caller)
    if caller.process.is_alive():
        shared._persistent_queue.put("DONE")
        caller.process.join(CLOSING_SECONDS)
    caller.process.kill()
    caller.process = shared._persistent_process = None
    shared._persistent_queue = shared._persistent_preload_q = shared._persistent_comp_q = None


def start_watched(start, run: TrainingRun):
    folder, need = (run.room.folder, run.room.need) if run.room else (None, 0)

    def start_and_watch(cls, *args, **kwargs):
        known = cls._persistent_process
        process = start.__func__(cls, *args, **kwargs)
        if process is not known:
            run.closing = threading.Event()  # its own, because the watch on an earlier writer may still read its event
            for each in (cls._persistent_queue, cls._persistent_preload_q):
                each._on_queue_feeder_error = _not_sent
            threading.Thread(target=_watch, args=(process, run.closing, folder, need), daemon=True).start()
        return process

    return classmethod(start_and_watch)


@around
def close_at_once(close, run: TrainingRun, self, abort=False):
    if self.process:
        _close(self, run.closing)


PATCHES = (
    *entries(
        "results", "megatron-core",
        (f"{_STRATEGIES}.filesystem_async:_results_queue", lambda known, run: start_results_queue(known), "NoneType",
         "a killed trainer leaves the process of this queue behind (filesystem_async.py:65)"),
    ),
    *entries(
        "writing", "megatron-core",
        (f"{_WRITER}.write_preloaded_data", instead(staticmethod(write_bucket)),
         "(transform_list, local_proc_idx, write_bucket, results_queue, ... 7, d5237fcd)",
         "does not say which file failed, with which need and how much free space (filesystem_async.py:361)"),
        (f"{_WRITER}.write_preloaded_data_multithread", instead(staticmethod(write_buckets)),
         "(transform_list, use_msc, rank, write_buckets, ... 5, 360f4c41)",
         "the failure of one thread ends the writer's process before it answers (filesystem_async.py:291)"),
        (f"{_WRITER}.retrieve_write_results", with_own_error, "(self)",
         "quotes the writer's error inside another (filesystem_async.py)"),
    ),
    *entries(
        "training", "megatron-core",
        (f"{_CALLER}.async_loop", instead(staticmethod(writer)),
         "(rank, queue, preload_q, comp_q, log_level, cpu_priority, ... 7, 8d12e042)",
         "outlives a killed trainer, and waits at its exit after a failure (async_utils.py:520)"),
        (f"{_CALLER}._get_process", start_watched, "(cls, rank, mp_mode, cpu_priority, io_priority)",
         "a writer that is killed answers nothing, and the trainer waits for it (async_utils.py:424)"),
        (f"{_CALLER}.close", close_at_once, "(self, abort)", "waits for a dead writer (async_utils.py:507)"),
    ),
)  # fmt: skip
