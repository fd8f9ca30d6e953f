"""Whether a student that another process is said to train will ever reach an iteration."""

import time
from pathlib import Path

from hylo_megatron.checkpoint.iterations import latest_number
from hylo_megatron.distill.spikes import DIVERGED, why_diverged
from hylo_megatron.errors import HyLoError

QUIET_SECONDS = 1800  # longer than a step, a save, or the start of a training takes


def check_still_trains(student: Path, wanted: int, now: float | None = None) -> None:
    """Raises ``HyLoError`` when ``student`` is no training's folder, is past ``wanted``, or is not written to."""
    reached = latest_number(student)
    if (marker := student / DIVERGED).is_file():
        raise HyLoError(f"--hylo-student {student}: its training diverged ({why_diverged(marker)})")
    where = f"--hylo-student {student}, --hylo-student-iteration {wanted}"
    if reached == 0:
        raise HyLoError(f"{where}: no training writes there, it is a finished student; leave the iteration out")
    if reached is not None and reached > wanted:
        raise HyLoError(f"{where}: the student is at iteration {reached} already; leave the iteration out")
    written = [path.stat().st_mtime for path in student.iterdir()] if student.is_dir() else []
    quiet = (now or time.time()) - max(written, default=now or time.time())
    if quiet > QUIET_SECONDS:
        raise HyLoError(
            f"{where}: nothing was written there for {quiet / 60:.0f} minutes, iteration {reached or 'none'} is the"
            " last; start the training that writes it, or leave the iteration out"
        )
