"""Disks that are too small, and what messages say of them."""

import contextlib
import resource

ROOM = r"it needs [\d.]+ [KMG]iB, [\d.]+ [KMG]iB is free on its disk; free space or choose another folder"


@contextlib.contextmanager
def largest_file(size: int):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
