"""Disk space for a training's checkpoints: checked before the training and before each save, watched while saving."""

import shutil
import sys
import threading
import time
from collections.abc import Callable
from math import prod
from pathlib import Path

from hylo_megatron.checkpoint import disk, iterations
from hylo_megatron.config import Architecture
from hylo_megatron.config.shapes import hf_shapes
from hylo_megatron.config.stages import StageKind
from hylo_megatron.errors import HyLoError

STATE_BYTES = 12  # per trained parameter: the optimizer's main copy and two moments, in fp32
ENTRY_BYTES = 2048  # per tensor in a file: torch's header around the numbers
STALLED_SECONDS, LOOK_SECONDS = 30, 2
CERTAIN = 0.9  # a save of this share of a checkpoint's size may be complete, and wait for its last step


def checkpoint_bytes(arch: Architecture, kind: StageKind, train: str, bf16: bool, optimizer: bool = True) -> int:
    """Bytes of one checkpoint of a training on any layout. ``train``: all or mixers."""
    total = stored = 0
    for name, shape in hf_shapes(arch).items():
        states = 3 if optimizer and kind.trains(name, train) else 0
        stored += 1 + states
        total += prod(shape) * ((2 if bf16 else 4) + STATE_BYTES // 3 * states)
    return total + ENTRY_BYTES * stored


class SaveRoom:
    """Room for saves into ``folder``. Each training has one, which rank 0 uses.

    A checkpoint has ``need`` bytes, that of the last step ``last`` (None: as many).
    """

    def __init__(self, folder: Path, need: int, fail: Callable[[str], object], last: int | None = None):
        self.folder, self.need, self.last, self._fail = folder, need, need if last is None else last, fail
        self._saving: Path | None = None
        self._size = need  # of the checkpoint that is being saved
        self._watching = False

    def _refuse_unless_room(self, need: int, what: str) -> None:
        if disk.free(self.folder) >= need:
            return
        for path in iterations.leftovers(self.folder):  # of failed saves: their room may suffice
            shutil.rmtree(path, ignore_errors=True)
        if disk.free(self.folder) < need:
            raise HyLoError(disk.line(self.folder, need, what))

    def check_start(self, saves: int, keep: int | None) -> None:
        """Check room for ``saves``. Raises ``HyLoError`` when the first cannot fit; warns when not all can stay."""
        self._refuse_unless_room(self.need if saves > 1 else self.last, "no room for the first checkpoint")
        kept = min(saves, keep + 1) if keep else saves
        most = kept * self.need if kept < saves else (kept - 1) * self.need + self.last
        if disk.free(self.folder) < most:
            what = f"no room for all {saves} checkpoints (--hylo-keep-last deletes old ones)"
            if keep:
                what = f"no room for {keep} checkpoints and the next one"
            print(f"warning: {disk.line(self.folder, most, what)}", file=sys.stderr, flush=True)

    def begin(self, place: Path, last: bool = False) -> None:
        """Begin a save into ``place``. Raises ``HyLoError`` when it cannot fit beside one that still runs."""
        running = max(0, self._size - disk.used(self._saving)) if self._saving else 0
        size = self.last if last else self.need
        self._refuse_unless_room(size + running, f"no room for {place.name}")
        self._saving, self._size = place, size
        if not self._watching:
            self._watching = True
            threading.Thread(target=self._watch, daemon=True).start()

    def end(self, place: Path) -> None:
        if self._saving == place:
            self._saving = None

    def _watch(self) -> None:
        """End the run when a save stands still on a disk that has no room for the rest of the save."""
        place, before, since = None, -1, time.monotonic()
        while True:
            time.sleep(LOOK_SECONDS)
            saving = self._saving
            written = disk.used(saving) if saving else 0
            if (saving, written) != (place, before):
                place, before, since = saving, written, time.monotonic()
                continue
            stalled = saving and time.monotonic() - since > STALLED_SECONDS
            if stalled and disk.free(self.folder) < CERTAIN * self._size - written:
                self._fail(disk.line(saving, self._size, f"{disk.text(written)} written, and no space left"))
