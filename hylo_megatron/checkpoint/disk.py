"""Room on a disk: free space, checks that something fits, and one-line errors when the disk is full.

This module imports nothing heavy, because the processes that write checkpoints import it.
"""

import contextlib
import errno
import os
import shutil
from collections.abc import Iterator
from pathlib import Path

from hylo_megatron.errors import HyLoError

FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)  # no space, an exceeded quota, or a limit on file size
# Messages into which torch's zip writer and safetensors turn these errors.
HIDDEN = ("unexpected pos", "file write failed", "No space left on device", "Disk quota exceeded", "File too large")
WHAT_TO_DO = "free space or choose another folder, then run the same command again"


def free(path: str | os.PathLike) -> int:
    """Return the bytes that this user may still write where ``path`` is or will be."""
    path = Path(path).absolute()
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def used(folder: str | os.PathLike) -> int:
    """Return the bytes that the files below ``folder`` take on the disk."""
    total = 0
    for path in Path(folder).rglob("*"):
        with contextlib.suppress(OSError):  # the file was renamed or removed in the meantime
            total += path.lstat().st_blocks * 512
    return total


def text(size: int) -> str:
    for unit, factor in (("GiB", 2**30), ("MiB", 2**20)):
        if size >= factor:
            return f"{size / factor:.1f} {unit}"
    return f"{size / 1024:.0f} KiB"


def cause_of(error: BaseException) -> BaseException | None:
    """Return the error of a full disk in ``error`` or in its causes, since libraries wrap it; None without one."""
    while error is not None:
        hidden = not isinstance(error, HyLoError) and any(words in str(error) for words in HIDDEN)
        if hidden or (isinstance(error, OSError) and error.errno in FULL):
            return error
        error = error.__cause__ or error.__context__
    return None


def drop_tracebacks(error: BaseException | None) -> None:
    """Free the objects in the frames of ``error`` and of its causes: torch's unfinished zip writer.

    The writer has to be freed before the file to which it writes. Garbage collection frees them in any order and then
    crashes (SIGSEGV).
    """
    seen = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        error.__traceback__ = None
        for failure in (getattr(error, "failures", None) or {}).values():
            drop_tracebacks(failure[0] if isinstance(failure, tuple) else failure)
        error = error.__cause__ or error.__context__


def line(path: str | os.PathLike, need: int | None, reason: str = "no space left") -> str:
    needs = f"it needs {text(need)}, " if need is not None else ""
    return f"{path}: {reason}: {needs}{text(free(path))} is free on its disk; {WHAT_TO_DO}"


def check(path: str | os.PathLike, need: int) -> None:
    """Raise ``HyLoError`` unless ``need`` bytes fit."""
    if free(path) < need:
        raise HyLoError(line(path, need))


def explained(error: BaseException, path: str | os.PathLike, need: int | None = None) -> HyLoError | None:
    """Return a full disk's error as one line, or None for another error. ``path``: what was being written."""
    cause = cause_of(error)
    if cause is None:
        return None
    reasons = [os.strerror(code) for code in (errno.EDQUOT, errno.EFBIG)]
    reason = next((reason.lower() for reason in reasons if reason in str(cause)), "no space left")
    file = getattr(cause, "filename", None)
    if file and need is None:
        return HyLoError(line(file, need, reason))
    return HyLoError(line(path, need, f"{reason} for {Path(file).name}" if file else reason))


@contextlib.contextmanager
def writing(path: str | os.PathLike) -> Iterator[None]:
    """Surround the writing of ``path``, and raise one line if the disk fills up meanwhile."""
    try:
        yield
    except HyLoError:
        raise
    except Exception as error:
        full = explained(error, path)
        if full is None:
            raise
        raise full from error
