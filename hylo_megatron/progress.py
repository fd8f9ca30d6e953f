"""A progress bar in bytes (in a terminal, else lines), and the peak memory of the process."""

import contextlib
import resource
import sys
import time
from collections.abc import Callable, Iterator

SECONDS_BETWEEN_LINES = 10


@contextlib.contextmanager
def byte_progress(total: int, what: str, *, lines: bool = False) -> Iterator[Callable[..., None]]:
    """Yield ``advance(bytes, note="")``. ``lines``: without a terminal print a line every ten seconds."""
    from tqdm import tqdm

    shown = time.monotonic()
    done = 0

    def advance(count: int, note: str = "") -> None:
        nonlocal done, shown
        done += count
        bar.set_postfix_str(note, refresh=False)
        bar.update(count)
        if bar.disable and lines and time.monotonic() - shown > SECONDS_BETWEEN_LINES:
            shown = time.monotonic()
            print(f"{100 * done / max(total, 1):.0f} %{note and ', ' + note}", flush=True)

    with tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None) as bar:  # None: without a terminal
        yield advance


def peak_memory_gib() -> float:
    """Return the peak resident memory of this process in GiB."""
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
