"""A progress bar in bytes, or plain silence without tqdm; and the peak memory of this process."""

import resource
import sys


class ByteProgress:
    def __init__(self, total: int, what: str):
        try:
            from tqdm import tqdm
        except ImportError:
            self.bar = None
        else:
            self.bar = tqdm(total=total, desc=what, unit="B", unit_scale=True, disable=None)

    def __call__(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()


def peak_memory_gib() -> float:
    """Peak resident memory of this process, GiB."""
    scale = 2**30 if sys.platform == "darwin" else 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / scale
