"""State that the replacements of one training share."""

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hylo_megatron.checkpoint.save_room import SaveRoom

if TYPE_CHECKING:
    from hylo_megatron.checkpoint.guard_state import GuardState
    from hylo_megatron.distill.host_memory import OptimizerAway
    from hylo_megatron.engine.guard import Guard
    from hylo_megatron.engine.step_log import StepLog
    from hylo_megatron.engine.step_profile import StepProfile


@dataclass(kw_only=True, eq=False)
class TrainingRun:
    """One call of ``pretrain``. The model provider adds to ``models`` before the first step.

    ``room`` is that of the disk which checkpoints are saved to. ``data`` is the data set of the training, which
    every rank has. ``home`` has the checkpoints that a rollback goes back to: it is the folder that the run has
    saved to, or before its first save the one that it has loaded with the optimizer. ``guarded`` is what the guard
    knew when the loaded checkpoint was saved. ``product_rate`` is the device's rate of matrix products in FLOP/s, or
    None on a CPU. ``closing`` belongs to the present writer of checkpoints, and is set once that writer is asked to
    end.
    """

    room: SaveRoom | None = None
    models: list = field(default_factory=list)
    log: "StepLog | None" = None
    guard: "Guard | None" = None
    guarded: "GuardState | None" = None
    profile: "StepProfile | None" = None
    product_rate: float | None = None
    data: Any = None
    home: Path | None = None
    schedule: Any = None  # of ild in a pipeline
    offload: "OptimizerAway | None" = None
    closing: threading.Event = field(default_factory=threading.Event)

    def flush_log(self) -> None:
        """Write the line of the last step. Raises ``HyLoError`` when the training must not go on."""
        if self.log is not None:
            self.log.flush()

    @contextlib.contextmanager
    def logged(self) -> Iterator[None]:
        """Write the last step's line when the training ends, whether by its last step or by an exit."""
        try:
            yield
        except SystemExit:
            self.flush_log()
            raise
        self.flush_log()
