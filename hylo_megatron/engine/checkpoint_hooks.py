"""Changes to megatron's saving and loading, so that a run goes on after a crash at any moment.

megatron 0.19.2 empties the tracker before it writes the tracker. It writes into folders that a crash left half full or
that the tracker names, and ends without an error (``sys.exit()``) when it finds an empty tracker.
"""

import contextlib
import io
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.distributed.checkpoint.api import CheckpointException

from hylo_megatron.checkpoint import guard_state, initial_states, iterations
from hylo_megatron.checkpoint.safe_pickles import check_pickles, explain
from hylo_megatron.engine.patch import around, entries
from hylo_megatron.engine.training_run import TrainingRun
from hylo_megatron.errors import HyLoError


def _args():
    from megatron.training.global_vars import get_args

    return get_args()


def _first_rank_alone(action: Callable[[], object]) -> None:
    """Run ``action`` on rank 0. The other ranks wait, and stop when the action fails."""
    failure = [None]
    if torch.distributed.get_rank() == 0:
        try:
            action()
        except (HyLoError, OSError) as error:
            failure = [error]
    torch.distributed.broadcast_object_list(failure, 0)
    if failure[0] is not None:  # one rank prints the failure
        raise failure[0] if torch.distributed.get_rank() == 0 else SystemExit(2)


class _Files:
    """megatron's file functions, with an ``open`` that writes a tracker atomically.

    After the write ``committed`` is called with the tracker's folder and what the tracker says.
    """

    def __init__(self, files, committed: Callable[[Path, str], object]):
        self._files, self._committed = files, committed

    def __getattr__(self, name):
        return getattr(self._files, name)

    def open(self, path, mode="r", *args, **kwargs):
        if mode == "w" and Path(path).name == iterations.TRACKER and "://" not in str(path):
            return self._tracker(Path(path).parent)
        return self._files.open(path, mode, *args, **kwargs)

    @contextlib.contextmanager
    def _tracker(self, folder: Path) -> Iterator[io.StringIO]:
        yield (text := io.StringIO())
        iterations.write_tracker(folder, text.getvalue())
        self._committed(folder, text.getvalue())


def drop_older(folder: Path) -> None:
    """Delete older checkpoints, on rank 0, once the tracker names the newer one, which is complete."""
    args = _args()
    if args.hylo_keep_last and folder == Path(args.save):
        for path in iterations.retire_older(folder, args.hylo_keep_last):
            threading.Thread(target=shutil.rmtree, args=(path, True)).start()


def whole_tracker(files, run: TrainingRun):
    def committed(folder: Path, word: str) -> None:
        if run.room and word.isdecimal():
            run.room.end(iterations.iteration_folder(folder, int(word)))
        drop_older(folder)

    return _Files(files, committed)


# ---- loading ----


def _exists(folder: str | None) -> bool:
    from megatron.training import checkpointing

    return checkpointing.checkpoint_exists(folder)


def _prepare(args, folder: str | None) -> None:
    own = args.save and folder and Path(folder).resolve() == Path(args.save).resolve()
    if folder:
        iterations.repair(folder, own)
    if not _exists(folder) and args.pretrained_checkpoint:
        iterations.repair(args.pretrained_checkpoint, own=False)


@around
def load_checked(load, run: TrainingRun, *models_and_optimizer, load_arg="load", **kwargs):
    from hylo_megatron.distill import resume

    args = _args()
    folder = getattr(args, load_arg)
    _first_rank_alone(lambda: _prepare(args, folder))
    resumes, path = _exists(folder), None
    source = folder if resumes else args.pretrained_checkpoint
    with contextlib.ExitStack() as stack:
        if source:
            path = iterations.asked_for(stack.enter_context(iterations.reading(source)), args.ckpt_step)
            _first_rank_alone(lambda: check_pickles(path))
        if resumes:
            optimizer, scheduler = models_and_optimizer[1:3]
            _first_rank_alone(lambda: resume.check(path, optimizer, scheduler, args))
            args.no_load_optim = args.no_load_optim or resume.has_no_optimizer(path, args)
            stack.enter_context(resume.learning_rates(path, optimizer, args))
        try:
            loaded = load(*models_and_optimizer, load_arg=load_arg, **kwargs)
        except CheckpointException as error:  # torch raises it on every rank
            failure = error
        else:
            if resumes and not (args.finetune or args.no_load_optim):
                run.home = Path(folder)
                _load_companions(run, path)
            return loaded
        _first_rank_alone(lambda: explain(path, failure))


def _layout(args) -> str:
    """Return what the sizes of initial states and their places on ranks follow from."""
    sizes = (args.tensor_model_parallel_size, args.pipeline_model_parallel_size, args.data_parallel_size)
    chunks = args.virtual_pipeline_model_parallel_size or 1
    return f"TP {sizes[0]} PP {sizes[1]} x {chunks} DP {sizes[2]}, {args.micro_batch_size} sequences"


def _load_companions(run: TrainingRun, path: Path) -> None:
    """Restore what is kept beside the checkpoint at ``path``. A rollback finds a guard, which stays as it is."""
    number = int(path.name.removeprefix("iter_")) if path.name.startswith("iter_") else 0
    if torch.distributed.get_rank() == 0:
        run.guarded = guard_state.read(path.parent, number)
    if _args().hylo_initial_states != "zero":
        _load_initial_states(run, path, number)


def _load_initial_states(run: TrainingRun, path: Path, number: int) -> None:
    """Restore the states that linear blocks start from: on all ranks, or on none."""
    args, rank = _args(), torch.distributed.get_rank()
    found = initial_states.read(path.parent, number, rank, _layout(args))
    everywhere = torch.tensor(float(found is not None), device=torch.cuda.current_device())
    torch.distributed.all_reduce(everywhere, torch.distributed.ReduceOp.MIN)
    if everywhere:
        for model in run.models:
            model.set_initial_states(found)
    elif rank == 0:
        print(f"warning: {path}: no initial states of this layout beside it, so the first step starts from zero")


# ---- saving ----


def _save_initial_states(run: TrainingRun, iteration: int) -> None:
    args, rank = _args(), torch.distributed.get_rank()
    if args.hylo_initial_states != "zero":  # a rank without linear blocks has a file without states
        states = {layer: state for model in run.models for layer, state in model.initial_states().items()}
        initial_states.write(Path(args.save), iteration, rank, states, _layout(args))


def _make_room(folder: str, iteration: int, run: TrainingRun, last: bool) -> None:
    """Set an older save aside: megatron would write over its files, under one ``metadata.json`` for both.

    The guard's state is written here too, on the first rank, which alone knows it.
    """
    place = iterations.iteration_folder(folder, iteration)
    if place.exists():
        iterations.set_aside(place)
    if run.room:
        run.room.begin(place, last)
    if run.guard:
        guard_state.write(Path(folder), iteration, run.guard.state())


def _is_the_one_loaded(args, iteration: int) -> bool:
    """Return whether a finished run that was started again would save what it has just loaded."""
    from megatron.training import checkpointing

    same_folder = args.load and Path(args.load).resolve() == Path(args.save).resolve()
    fresh = args.finetune or args.override_ckpt_iteration is not None
    return bool(same_folder and not fresh and checkpointing.get_loaded_iteration() == iteration)


@around
def save_apart(save, run: TrainingRun, iteration, *what, non_persistent_ckpt=False, **kwargs):
    args = _args()
    run.flush_log()  # a training that has diverged ends before it saves
    if not non_persistent_ckpt:
        if _is_the_one_loaded(args, iteration):
            return
        last = args.hylo_last_weights_only and iteration == args.train_iters
        args.no_save_optim = args.no_save_optim or last
        _first_rank_alone(lambda: _make_room(args.save, iteration, run, last))
        _save_initial_states(run, iteration)
    save(iteration, *what, non_persistent_ckpt=non_persistent_ckpt, **kwargs)
    if not non_persistent_ckpt:
        # A rollback goes to this checkpoint, no longer to the one that was loaded.
        args.ckpt_step, run.home = None, Path(args.save)


_LOOP, _FILES = "megatron.training.training", "megatron/training/checkpointing.py"
PATCHES = entries(
    "training", "megatron-core",
    ("megatron.training.checkpointing:maybe_msc", whole_tracker, "MaybeMultiStorageClient",
     f"the tracker is emptied before it is written ({_FILES}:1011)"),
    (f"{_LOOP}:load_checkpoint", load_checked,
     "(ddp_model, optimizer, opt_param_scheduler, load_arg, strict, ... 13, 01787541)",
     "repairs nothing that a crash left, checks no pickles, and ends without an error on an empty tracker"
     f" ({_FILES})"),
    (f"{_LOOP}:save_checkpoint", save_apart, "(iteration, model, optimizer, opt_param_scheduler, ... 21, 5253c3bc)",
     f"writes into a folder that a crash left half full, and does not ask for room ({_FILES})"),
)  # fmt: skip
