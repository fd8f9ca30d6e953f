"""Where training reaches into megatron's saving and loading: a crash at any moment must leave a run that goes on.

The engine (0.19.2) empties the tracker before it writes it, writes into folders that a crash left half full or that
the tracker names, and ends without an error (``sys.exit()``) when it finds an empty tracker.
"""

import contextlib
import io
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from megatron.training import checkpointing, training
from megatron.training.global_vars import get_args
from torch.distributed.checkpoint.api import CheckpointException

from hylo_megatron.checkpoint import iterations
from hylo_megatron.checkpoint.safe_pickles import check_pickles, explain
from hylo_megatron.checkpoint.save_room import SaveRoom
from hylo_megatron.distill import resume
from hylo_megatron.engine import checkpoint_writer
from hylo_megatron.errors import HyLoError


def _first_rank_alone(action: Callable[[], object]) -> None:
    """Everybody else waits, and stops when it fails."""
    failure = [None]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except (HyLoError, OSError) as error:
            failure = [error]
    torch.distributed.broadcast_object_list(failure, 0)
    if failure[0] is not None:  # said once
        raise failure[0] if torch.distributed.get_rank() == 0 else SystemExit(2)


class _Files:
    """The engine's file functions; a tracker is written whole or not at all, then ``committed`` is called with its
    folder and what it says."""

    def __init__(self, engine, committed: Callable[[Path, str], object]):
        self._engine, self._committed = engine, committed

    def __getattr__(self, name):
        return getattr(self._engine, name)

    def open(self, path, mode="r", *args, **kwargs):
        if mode == "w" and Path(path).name == iterations.TRACKER and "://" not in str(path):
            return self._tracker(Path(path).parent)
        return self._engine.open(path, mode, *args, **kwargs)

    @contextlib.contextmanager
    def _tracker(self, folder: Path) -> Iterator[io.StringIO]:
        yield (text := io.StringIO())
        iterations.write_tracker(folder, text.getvalue())
        self._committed(folder, text.getvalue())


def drop_older(folder: Path) -> None:
    """Runs where the tracker is written: on rank 0, when the newer checkpoint is complete and named."""
    args = get_args()
    if args.hylo_keep_last and folder == Path(args.save):
        for path in iterations.retire_older(folder, args.hylo_keep_last):
            threading.Thread(target=shutil.rmtree, args=(path, True)).start()


def _prepare(args, folder: str | None) -> None:
    own = args.save and folder and Path(folder).resolve() == Path(args.save).resolve()
    if folder:
        iterations.repair(folder, own)
    if not checkpointing.checkpoint_exists(folder) and args.pretrained_checkpoint:
        iterations.repair(args.pretrained_checkpoint, own=False)


def _make_room(folder: str, iteration: int, room: SaveRoom | None) -> None:
    """The engine would write over what lies there, and its ``metadata.json`` would vouch for both halves."""
    place = iterations.iteration_folder(folder, iteration)
    if place.exists():
        iterations.set_aside(place)
    if room:
        room.begin(place)


def _is_the_one_loaded(args, iteration: int) -> bool:
    """A finished run that is started again ends by saving what it has just loaded."""
    same_folder = args.load and Path(args.load).resolve() == Path(args.save).resolve()
    fresh = args.finetune or args.override_ckpt_iteration is not None
    return bool(same_folder and not fresh and checkpointing.get_loaded_iteration() == iteration)


def install(room: SaveRoom | None = None) -> None:
    """Called once, before ``pretrain``. ``room``: of the disk that is saved to. Rank 0 looks after it."""
    load, save = training.load_checkpoint, training.save_checkpoint
    checkpoint_writer.install(room and room.folder, room.need if room else 0)

    def committed(folder: Path, word: str) -> None:
        if room and word.isdecimal():
            room.end(iterations.iteration_folder(folder, int(word)))
        drop_older(folder)

    checkpointing.maybe_msc = _Files(checkpointing.maybe_msc, committed)

    def load_checked(*models_and_optimizer, load_arg="load", **kwargs):
        args = get_args()
        folder = getattr(args, load_arg)
        _first_rank_alone(lambda: _prepare(args, folder))
        resumes, path = checkpointing.checkpoint_exists(folder), None
        source = folder if resumes else args.pretrained_checkpoint
        with contextlib.ExitStack() as stack:
            if source:
                path = iterations.asked_for(stack.enter_context(iterations.reading(source)), args.ckpt_step)
                _first_rank_alone(lambda: check_pickles(path))
            if resumes:
                run = path, *models_and_optimizer[1:3], args
                _first_rank_alone(lambda: resume.check(*run))
                stack.enter_context(resume.learning_rates(*run))
            try:
                return load(*models_and_optimizer, load_arg=load_arg, **kwargs)
            except CheckpointException as error:  # torch raises it on every rank
                failure = error
            _first_rank_alone(lambda: explain(path, failure))

    def save_apart(iteration, *what, non_persistent_ckpt=False, **kwargs):
        args = get_args()
        if not non_persistent_ckpt:
            if _is_the_one_loaded(args, iteration):
                return
            _first_rank_alone(lambda: _make_room(args.save, iteration, room))
        save(iteration, *what, non_persistent_ckpt=non_persistent_ckpt, **kwargs)

    training.load_checkpoint, training.save_checkpoint = load_checked, save_apart
