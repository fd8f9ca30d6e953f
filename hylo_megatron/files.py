"""Write a file or a folder whole: under its name stands the complete new content, or what stood there before."""

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


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


def write_text(path: str | os.PathLike, text: str, *, synced: bool = False) -> None:
    """Replace the file at ``path``. ``synced``: return only when the text is on the disk."""
    with whole_file(path) as scratch, scratch.open("w", encoding="utf-8", newline="\n") as file:
        file.write(text)
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
