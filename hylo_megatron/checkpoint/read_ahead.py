"""Let the kernel read a checkpoint into memory while torch and megatron-core are imported and kernels compile."""

import contextlib
import os
import threading
from pathlib import Path


def read_ahead(iteration: Path) -> threading.Thread:
    """Ask for the files of an iteration in a thread, and return the thread. Errors are left to the real reader."""
    thread = threading.Thread(target=_ask_for, args=(sorted(iteration.glob("*.distcp")),), daemon=True)
    thread.start()
    return thread


def _ask_for(paths: list[Path]) -> None:
    for path in paths if hasattr(os, "posix_fadvise") else ():
        with contextlib.suppress(OSError), path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_WILLNEED)
