"""What the guard of a training knew when a checkpoint was saved: ``SAVE/guard/iter_0000100.json``.

A resumed run compares its steps with the medians of the interrupted one, and goes on counting its rollbacks. After a
divergence the next run begins anew.
"""

import sys
from pathlib import Path

from typing_extensions import TypedDict

from hylo_megatron.checkpoint.beside import drop_orphans, file_beside
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import write_json
from hylo_megatron.json_file import Count, Number, read_json

FOLDER = "guard"


class GuardState(TypedDict):
    """``losses`` and ``norms``: those of the last steps. ``lowest``: the lowest median loss, None before the first.

    ``skipped``: steps in a row. ``loss``: the loss whose values these are, in the ``phase`` of its weights.
    """

    losses: list[Number]
    norms: list[Number]
    lowest: Number | None
    skipped: Count
    rollbacks: Count
    loss: dict[str, str]
    phase: list[bool]


def write(save_folder: Path, iteration: int, state: GuardState) -> None:
    """Write the state before the checkpoint of ``iteration``."""
    path = file_beside(save_folder, FOLDER, iteration, ".json")
    drop_orphans(path, ".json")
    write_json(path, state, indent=None)


def read(save_folder: Path, iteration: int) -> GuardState | None:
    """Return the state of ``iteration``; None if there is none, as beside checkpoints of earlier versions."""
    path = file_beside(save_folder, FOLDER, iteration, ".json")
    if not path.is_file():
        return None
    try:
        return read_json(path, GuardState)
    except HyLoError as error:
        print(f"warning: {error}: the guard begins without medians", file=sys.stderr, flush=True)
        return None


def forget(save_folder: Path) -> None:
    """Remove the states of all checkpoints: the training has diverged."""
    for path in (save_folder / FOLDER).glob("iter_*.json"):
        path.unlink(missing_ok=True)
