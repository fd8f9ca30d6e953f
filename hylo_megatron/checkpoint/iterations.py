"""Choose the iteration of a checkpoint folder to load, and find those that are complete or may be deleted.

The tracker (``latest_checkpointed_iteration.txt``) names the iteration to load. If a crash left the tracker empty,
missing or with an incomplete iteration, the newest complete iteration is loaded. An iteration is complete if its
``metadata.json``, which megatron-core writes last, can be read and torch has renamed ``.metadata`` to its final name.
"""

import contextlib
import os
import re
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from hylo_megatron.checkpoint.diverged import why_diverged
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import try_lock, write_text
from hylo_megatron.json_file import read_json

TRACKER = "latest_checkpointed_iteration.txt"
QUIET_SECONDS = 1800  # more than a step, a save or the start of a training takes
INCOMPLETE, DROPPED = ".incomplete", ".dropped"  # suffixes of folders that are not checkpoints, or no longer


def is_complete(path: Path) -> bool:
    try:
        described = read_json(path / "metadata.json")
        return "sharded_backend" in described and (path / ".metadata").stat().st_size > 0
    except (OSError, HyLoError):
        return False


def iteration_folder(folder: Path, iteration: int) -> Path:
    return Path(folder) / f"iter_{iteration:07d}"


def _number(path: Path) -> int:
    return int(path.name.removeprefix("iter_"))


def _iteration_folders(folder: Path) -> list[Path]:
    return sorted((p for p in Path(folder).glob("iter_*") if re.fullmatch(r"iter_[0-9]{7,18}", p.name)), key=_number)


def complete_iterations(folder: Path) -> list[Path]:
    """Return the complete iterations, oldest first."""
    return [path for path in _iteration_folders(folder) if is_complete(path)]


def _tracked(folder: Path) -> Path | None:
    """Return the folder that the tracker names, whether it exists or not; None if it names nothing."""
    try:
        word = (folder / TRACKER).read_text().strip()
    except (OSError, ValueError):
        return None
    if word == "release":
        return folder / word
    return iteration_folder(folder, int(word)) if re.fullmatch("[0-9]{1,18}", word) else None


def latest_number(folder: str | os.PathLike) -> int | None:
    """Return the iteration that the tracker names, 0 for a checkpoint that no training wrote, or None."""
    path = _tracked(Path(folder))
    return path and (0 if path.name == "release" else _number(path))


def latest(folder: str | os.PathLike, quiet: bool = False) -> Path:
    """Return the iteration folder to load from ``folder``. Raises ``HyLoError``.

    ``quiet``: print no warning if another iteration than the tracker's is taken.
    """
    folder = Path(folder)
    path = _tracked(folder)
    if path and is_complete(path):
        return path
    whole = complete_iterations(folder)
    if whole and quiet:
        return whole[-1]
    if whole:
        found = f"names {path.name}, which is incomplete" if path else "is missing or empty"
        print(f"warning: {folder / TRACKER} {found}: taking {whole[-1].name}", file=sys.stderr, flush=True)
        return whole[-1]
    if path:
        raise HyLoError(f"{path}: {TRACKER} names it, but it is incomplete, and no other iteration is there")
    if (folder / TRACKER).exists():
        raise HyLoError(f"{folder / TRACKER} names no iteration, and no complete one is there")
    raise HyLoError(f"{folder / TRACKER} not found: expected a Megatron checkpoint folder")


def asked_for(found: Path, step: int | None) -> Path:
    """Return the iteration that megatron-core loads from the folder of ``found``. ``step``: ``--ckpt-step``."""
    return iteration_folder(found.parent, step) if step else found


def trained_to(folder: str | os.PathLike, iteration: int) -> bool:
    """Return whether the iteration to load is ``iteration`` and complete. Prints and raises nothing."""
    path = _tracked(Path(folder))
    return path is not None and path == iteration_folder(folder, iteration) and is_complete(path)


def _written_at(path: Path) -> float:
    try:
        return path.stat().st_mtime
    except FileNotFoundError:  # the training has just removed or renamed it
        return time.time()


def check_still_trains(student: Path, wanted: int, now: float | None = None) -> None:
    """Raise ``HyLoError`` if ``student`` is not being trained, is past ``wanted``, or was not written to for long."""
    if why := why_diverged(student):
        raise HyLoError(f"--hylo-student {student}: its training diverged ({why})")
    reached = latest_number(student)
    where = f"--hylo-student {student}, --hylo-student-iteration {wanted}"
    if reached == 0:
        raise HyLoError(f"{where}: no training writes there, it is a finished student; leave the iteration out")
    if reached is not None and reached > wanted:
        raise HyLoError(f"{where}: the student is at iteration {reached} already; leave the iteration out")
    written = [_written_at(path) for path in student.iterdir()] if student.is_dir() else []
    quiet = (now or time.time()) - max(written, default=now or time.time())
    if quiet > QUIET_SECONDS:
        raise HyLoError(
            f"{where}: nothing was written there for {quiet / 60:.0f} minutes, iteration {reached or 'none'} is the"
            " last; start the training that writes it, or leave the iteration out"
        )


# ---- changes, made only by the one process that saves ----


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_tracker(folder: Path, word: str) -> None:
    """Write the tracker atomically, after all files of the iteration that it names."""
    folder = Path(folder)
    target = folder / "release" if word == "release" else iteration_folder(folder, int(word))
    for path in (target / ".metadata", target / "metadata.json", target):
        if path.exists():
            _sync(path)
    write_text(folder / TRACKER, word, synced=True)
    _sync(folder)


def set_aside(path: Path) -> Path:
    """Rename a folder that is incomplete, or in the way of a new save. An older one of the new name is deleted."""
    target = path.with_name(path.name + INCOMPLETE)
    shutil.rmtree(target, ignore_errors=True)
    os.replace(path, target)
    return target


def repair(folder: str | os.PathLike, own: bool) -> None:
    """Make the tracker name what ``latest`` finds. In a folder of our ``own`` also rename incomplete iterations.

    No process may be saving into ``folder``. Raises ``HyLoError`` if there is a tracker but no checkpoint.
    """
    folder = Path(folder)
    if own:
        for path in _iteration_folders(folder):
            if not is_complete(path):
                kept = set_aside(path)
                print(f"warning: {path} is incomplete: set aside as {kept.name}", file=sys.stderr, flush=True)
        for path in folder.glob("iter_*" + DROPPED):
            shutil.rmtree(path, ignore_errors=True)
    if not (folder / TRACKER).exists() and not complete_iterations(folder):
        return
    found = latest(folder)
    if found != _tracked(folder):
        write_tracker(folder, str(_number(found)))


def retire_older(folder: str | os.PathLike, keep: int = 1) -> list[Path]:
    """Rename the complete iterations before the last ``keep``, and return what may be deleted.

    The count starts at the iteration that the tracker names. While this one is incomplete, nothing is renamed. An
    iteration that is being read is never renamed.
    """
    folder = Path(folder)
    newest = _tracked(folder)
    if newest is None or newest.name == "release" or not is_complete(newest):
        return []
    older = [path for path in complete_iterations(folder) if _number(path) < _number(newest)]
    for path in older[: max(0, len(older) - keep + 1)]:
        _retire(path)
    return leftovers(folder)


def leftovers(folder: str | os.PathLike) -> list[Path]:
    """Return folders that are not checkpoints, or no longer, and may be deleted."""
    return [*Path(folder).glob("iter_*" + DROPPED), *Path(folder).glob("iter_*" + INCOMPLETE)]


def _retire(path: Path) -> None:
    if path.is_symlink():  # a link belongs to the user
        return
    with contextlib.suppress(FileNotFoundError), (path / "metadata.json").open("r+") as file:
        if try_lock(file):  # a folder that is being read is deleted by a later save
            os.replace(path, path.with_name(path.name + DROPPED))


# ---- reading: what is held open is not deleted ----


def _hold(path: Path) -> IO | None:
    """Return a lock that keeps ``path`` from being deleted until it is closed; None if the deletion has begun."""
    try:
        file = (path / "metadata.json").open()
    except FileNotFoundError:
        return None
    if try_lock(file, shared=True) and (path / "metadata.json").exists():
        return file
    file.close()  # the folder is being renamed, or was renamed between opening and locking
    return None


def hold_latest(folder: str | os.PathLike) -> tuple[Path, IO]:
    """Return ``latest`` and a lock file to close after reading."""
    while True:
        path = latest(folder)
        if (file := _hold(path)) is not None:
            return path, file


@contextlib.contextmanager
def reading(folder: str | os.PathLike) -> Iterator[Path]:
    """Yield ``latest``, which is not deleted during the block."""
    path, file = hold_latest(folder)
    with file:
        yield path
