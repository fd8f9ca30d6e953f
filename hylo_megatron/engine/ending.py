"""End a training on all its ranks when one of them raises an error, with one line that says why."""

import contextlib
import traceback
from collections.abc import Iterator
from typing import NoReturn

from hylo_megatron.checkpoint import disk
from hylo_megatron.engine import peers
from hylo_megatron.errors import HyLoError, first_line


def _failures(error: BaseException) -> list[BaseException] | None:
    """Return the errors that torch's checkpoint collected on rank 0 (none elsewhere), or None for another error."""
    found = getattr(error, "failures", None)
    if found is None:
        return None
    return [failure[0] if isinstance(failure, tuple) else failure for failure in found.values()]


def _may_follow(error: BaseException) -> bool:
    """Return whether ``error`` may be a consequence of another rank's error.

    torchrun ends the data workers of all ranks when one rank is lost, some of them before their own rank.
    """
    if peers.alone():
        return False
    words = ("connection closed by peer", "connection reset", "gloo", "nccl", "broken pipe", "tcpstore",
             "killed by signal: terminated")  # fmt: skip
    return _failures(error) == [] or any(word in str(error).lower() for word in words)


def _ended_by(error: BaseException, folder: str | None, need: int | None) -> NoReturn:
    peers.forget_workers()
    for one in [error, *(_failures(error) or [])]:
        full = disk.explained(one, folder or ".", need)
        if isinstance(one, HyLoError) or full:
            peers.fail(str(full or one))
    if _may_follow(error):
        peers.hear_the_others(peers.NEWS_SECONDS)
    with contextlib.suppress(Exception):
        traceback.print_exception(error)
    peers.fail(f"{type(error).__name__}: {first_line(error)}")


@contextlib.contextmanager
def ending_together(folder: str | None, need: int | None = None) -> Iterator[None]:
    """End the training on all ranks when the block raises on one, in one line if the user can do something about it.

    ``folder`` and ``need``: what is written, and its size, for errors that name no file.
    """
    try:
        yield
    except SystemExit as leaving:
        if leaving.code not in (None, 0):  # another rank has printed the reason
            peers.follow()
        peers.leave()
        raise
    except BaseException as error:
        _ended_by(error, folder, need)
    peers.leave()
