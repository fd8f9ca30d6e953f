"""Write a file or a folder whole: under its name stands the complete new content, or what stood there before."""

import contextlib
import fcntl
import json
import os
import shutil
import time
import uuid
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Any

from hylo_megatron.errors import HyLoError

LFS = b"version https://git-lfs"  # begins a file that Git LFS has not fetched
PATIENCE = 2  # seconds in which the children of a process that was killed end, which hold its locks


@contextlib.contextmanager
def whole_file(path: str | os.PathLike, *, shared: bool = False) -> Iterator[Path]:
    """Yield ``PATH.partial``, which takes the place of ``path`` when the block ends and goes when the block raises.

    ``shared``: several processes may write ``path`` at the same time, so each has a scratch file of its own.
    """
    path = Path(path)
    own = f".{uuid.uuid4().hex[:8]}" if shared else ""
    scratch = path.with_name(f"{path.name}{own}.partial")
    try:
        yield scratch
        os.replace(scratch, path)
    finally:
        scratch.unlink(missing_ok=True)


@contextlib.contextmanager
def only_writer(path: Path, what: str) -> Iterator[None]:
    """Keep other processes from writing ``what`` during the block. The lock file ``path`` goes when the block ends.

    Raises ``HyLoError`` if another process writes. A process that was killed holds no lock. Nothing is locked on a
    file system without locks.
    """
    with contextlib.ExitStack() as stack:
        end = time.monotonic() + PATIENCE
        while not _holds(stack.enter_context(path.open("a")), path):
            if time.monotonic() > end:
                raise HyLoError(
                    f"{what}: another process is writing it; wait for its end, or choose another. If its machine is"
                    f" gone, which may leave the lock on a network file system, remove {path}"
                )
            time.sleep(0.1)
        stack.callback(path.unlink, missing_ok=True)
        yield


def try_lock(file: IO, *, shared: bool = False) -> bool:
    """Lock ``file`` until it is closed, and return True. Return False if another process holds a lock.

    Nothing is locked on a file system without locks.
    """
    try:
        fcntl.flock(file, fcntl.LOCK_NB | (fcntl.LOCK_SH if shared else fcntl.LOCK_EX))
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        pass
    return True


def _holds(file: IO, path: Path) -> bool:
    """Lock ``file``. Return False if another process holds a lock, or has removed ``path`` since it was opened."""
    try:
        return try_lock(file) and os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def write_text(path: str | os.PathLike, text: str, *, synced: bool = False) -> None:
    """Replace the file at ``path``. ``synced``: return only when the text is on the disk."""
    write_lines(path, (text,), synced=synced)


def write_lines(path: str | os.PathLike, lines: Iterable[str], *, synced: bool = False) -> None:
    """Replace the file at ``path`` by ``lines``, each of which brings its own line end."""
    with whole_file(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(lines)
        if synced:
            file.flush()
            os.fsync(file.fileno())


def write_json(path: str | os.PathLike, value: Any, **options) -> None:
    """Replace the file at ``path`` by ``value`` as JSON; ``options`` are those of ``json.dumps``."""
    write_text(path, json.dumps(value, **{"indent": 1, **options}))


def fresh_partial(out: Path) -> Path:
    """Return an empty folder ``OUT.partial`` beside ``out``; what an interrupted run left there is removed."""
    partial = out.with_name(out.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    return partial


def not_downloaded(path: Path) -> str | None:
    """Return why a file exists only by name and what to do; None for any other file, and if there is none."""
    if path.is_symlink() and not path.exists():
        return f"a link to {os.readlink(path)}, which is missing; download the file again"
    with contextlib.suppress(OSError), path.open("rb") as file:
        if file.read(len(LFS)) == LFS:
            return "a pointer of Git LFS in place of the file; run git lfs pull in its folder"
    return None
