"""Triton's tuner compiles its candidates on all cores before it times them one after another.

Triton itself compiles a candidate when it is about to be timed, on one core. A fresh machine spends most of the time
before its first step this way.
"""

import contextlib
import os
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from hylo_megatron.engine.patch import around, entries
from hylo_megatron.files import try_lock

SWITCH = "HYLO_COMPILE_AHEAD"  # in the environment: 0 lets Triton compile one candidate after another
LOCK = "hylo-compile.lock"
PATIENCE = 300  # seconds that a process waits for another's compilation before it compiles too


def wanted() -> bool:
    return os.environ.get(SWITCH, "1") != "0"


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Let one process at a time compile for this cache folder: the next one finds most candidates compiled.

    No process uses its GPU while it holds the lock, so no rank that waits for others on the GPU can keep them from it.
    """
    from triton import knobs

    with contextlib.ExitStack() as stack:
        with contextlib.suppress(OSError):  # a file system without locks
            folder = Path(knobs.cache.dir)
            folder.mkdir(parents=True, exist_ok=True)
            file, end = stack.enter_context((folder / LOCK).open("w")), time.monotonic() + PATIENCE
            while not try_lock(file) and time.monotonic() < end:
                time.sleep(0.05)
        yield


def compile_all(tuner, candidates: list, arguments: tuple, options: dict) -> None:
    """Compile the candidates for a call's arguments. One that does not compile fails again when it is timed."""
    from triton.runtime._async_compile import AsyncCompileMode

    cores = len(os.sched_getaffinity(0))
    with alone(), ThreadPoolExecutor(cores) as pool, AsyncCompileMode(pool, ignore_errors=True):
        for candidate in candidates:
            tuner.fn.run(*arguments, **{**options, "warmup": True}, **candidate.all_kwargs())


@around
def compiled_first(bench, run, self, *args, config, **meta):
    """Return Triton's ``_bench``, which times one candidate, with all candidates compiled before the first of them."""
    candidates = self.prune_configs(meta)
    # A hook before the launch may change the arguments, and with them what is compiled.
    if config == candidates[0] and not any(candidate.pre_hook for candidate in candidates):
        try:
            compile_all(self, candidates, args, meta)
        except Exception as error:  # Triton compiles what is missing
            why = f"{type(error).__name__}: {error}".splitlines()[0]
            print(f"warning: {self.base_fn.__name__} is compiled on one core ({why})", file=sys.stderr, flush=True)
    return bench(self, *args, config=config, **meta)


PATCHES = entries(
    "tuning", "triton",
    ("triton.runtime.autotuner:Autotuner._bench", compiled_first, "(self, *args, config, **meta)",
     "the tuner compiles each candidate when it times it, on one core: the first step of a fresh machine took minutes"
     " (triton/runtime/autotuner.py:141)"),
    needed=wanted,
)  # fmt: skip
