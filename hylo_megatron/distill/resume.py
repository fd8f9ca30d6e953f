"""Resume a training with another schedule: more steps, another learning rate.

Megatron asserts that the schedule of a checkpoint is the one on the command line. It pairs the optimizer's parameter
groups by their learning rates, so that a new ``--lr`` finds no group (``distrib_optimizer.py:970``).
"""

import contextlib
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from hylo_megatron.checkpoint.iterations import complete_iterations, latest_number
from hylo_megatron.config import Architecture, positions
from hylo_megatron.errors import HyLoError

# Entries of the scheduler's state, and the flags that they follow from.
FLAGS = {
    "max_lr": "--lr",
    "min_lr": "--min-lr",
    "lr_warmup_steps": "--lr-warmup-fraction",
    "lr_decay_style": "--lr-decay-style",
    "lr_decay_steps": "--train-iters",
    "start_wd": "--weight-decay",
    "end_wd": "--weight-decay",
    "wd_incr_style": "--weight-decay-incr-style",
    "wd_incr_steps": "--train-iters",
}
# Settings that decide which parameters are trained, and in which groups. A run cannot change them on the way.
FIXED = ("hylo_stage", "hylo_train", "hylo_copied_lr_mult", "hylo_decay_lr_mult", "hylo_control")
FREE = ("rope_parameters", "max_position_embeddings", "extra")  # of an architecture; a training may change them
UNKNOWN = {"hylo_control": False}  # of runs that were started before there was the flag


def _check_kept(what: str, now, folder: Path, before) -> None:
    if now != before:
        raise HyLoError(
            f"{what} is {now}, the run in {folder} was started with {before}: a run that goes on keeps it; give the"
            " old value, or another --save and --load"
        )


def check_fixed(saved, args, path: Path) -> None:
    for name in FIXED:
        before = getattr(saved, name, UNKNOWN.get(name))
        _check_kept("--" + name.replace("_", "-"), getattr(args, name), path.parent, before)


def _has_checkpoint(folder: Path) -> bool:
    return bool(complete_iterations(folder)) or latest_number(folder) is not None


def check_architecture(where: str, folder: Path, arch: Architecture) -> None:
    """Raise ``HyLoError`` if the run in ``folder``, the value of the flag ``where``, trains another student."""
    if not (folder / "hylo.json").is_file() or not _has_checkpoint(folder):  # a run that ended before its first save
        return
    before = Architecture.load(folder)
    free = {name: getattr(arch, name) for name in (*positions.FIELDS, *FREE)}
    if replace(before, **free) != arch:
        raise HyLoError(f"{where} {folder} holds a run of another student; choose another folder")
    if not complete_iterations(folder):
        return
    fields = {name: positions.flag(name, "--hylo-") for name in positions.FIELDS}
    fields |= {"rope_parameters": "--hylo-rope", "window": where}  # no training changes a window
    for name, flag in fields.items():
        _check_kept(f"{flag}: {name}", getattr(arch, name), folder, getattr(before, name))


def check_save(args, arch: Architecture) -> None:
    """Raise ``HyLoError`` if ``--save`` or ``--load`` has another use, or holds the run of another student."""
    if not args.save:
        return
    if Path(args.save).resolve() == Path(args.hylo_student).resolve():
        raise HyLoError("--save and --hylo-student are the same folder; choose another --save")
    check_architecture("--save", Path(args.save), arch)
    given = args.load and Path(args.load).resolve() != Path(args.save).resolve()
    if given and not _has_checkpoint(Path(args.load)):
        raise HyLoError(
            f"--load {args.load}: has no checkpoint of a training; leave --load out to begin with --hylo-student"
        )
    if args.load and not (args.finetune or args.no_load_optim):
        check_architecture("--load", Path(args.load), arch)


def changed_schedule(saved: dict, scheduler) -> list[str]:
    """Return a phrase for each flag that makes another schedule than ``saved``. Megatron counts steps in sequences."""
    now = scheduler.state_dict()
    differ = [name for name in FLAGS if name in saved and saved[name] != now[name]]
    phrases = {FLAGS[name]: f"{FLAGS[name]} ({name} {now[name]}, was {saved[name]})" for name in reversed(differ)}
    return list(reversed(phrases.values()))


def _common(path: Path, args) -> dict:
    """Return what the checkpoint ``path`` says of its run; empty where only weights are loaded."""
    if args.finetune or args.no_load_optim:
        return {}
    from megatron.core import dist_checkpointing

    return dist_checkpointing.load_common_state_dict(str(path))


def _saved(path: Path, optimizer, args) -> dict | None:
    """Return the state of the run that saved ``path``, or None where there is none to go on with."""
    common = {} if optimizer is None else _common(path, args)
    return common if {"args", "optimizer", "opt_param_scheduler"} <= common.keys() else None


def has_no_optimizer(path: Path, args) -> bool:
    """Return whether the optimizer would be loaded from ``path``, a checkpoint of a training, and is not there."""
    common = _common(path, args)
    return "args" in common and "optimizer" not in common


def _is_finished(path: Path, args) -> bool:
    number = re.fullmatch(r"iter_(\d+)", path.name)
    return bool(number and args.train_iters) and int(number[1]) >= args.train_iters


def check(path: Path, optimizer, scheduler, args) -> None:
    """Raise ``HyLoError`` with the flags by which this run differs from the one that saved ``path``, if any.

    A finished run needs no optimizer any more, and may be started again without one.
    """
    if has_no_optimizer(path, args) and not _is_finished(path, args):
        raise HyLoError(
            f"{path} has no optimizer's states, expected those of a run that goes on; start another training from its"
            f" weights by --hylo-student {path.parent} and another --save, or give --no-load-optim"
        )
    saved = _saved(path, optimizer, args)
    if not saved:
        return
    check_fixed(saved["args"], args, path)
    changed = changed_schedule(saved["opt_param_scheduler"], scheduler) if scheduler else []  # a rollback has none
    if changed and not (args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler):
        raise HyLoError(
            f"the run in {path.parent} has another schedule: {'; '.join(changed)}. Go on with the new one by"
            " --override-opt_param-scheduler, or with the checkpoint's by --use-checkpoint-opt_param-scheduler"
        )


@contextlib.contextmanager
def learning_rates(path: Path, optimizer, args) -> Iterator[None]:
    """Give the groups the checkpoint's learning rates while ``path`` is loaded: megatron finds groups by them."""
    saved = _saved(path, optimizer, args)
    if not saved:
        yield
        return
    # The schedule's rates: after --use-checkpoint-opt_param-scheduler the flags' are others.
    old_of, was = {}, saved["opt_param_scheduler"]
    for factor in (1.0, args.hylo_copied_lr_mult, args.hylo_decay_lr_mult):
        new = args.lr * factor, (args.min_lr or 0.0) * factor
        old_of[new] = was["max_lr"] * factor, was["min_lr"] * factor
    rates = [(group["max_lr"], group["min_lr"]) for group in optimizer.param_groups]
    for group, new in zip(optimizer.param_groups, rates, strict=True):
        group["max_lr"], group["min_lr"] = old_of.get(new, new)  # in a rollback they may be the checkpoint's
    yield
    if args.override_opt_param_scheduler:  # megatron keeps the order of the groups
        for group, new in zip(optimizer.param_groups, rates, strict=True):
            group["max_lr"], group["min_lr"] = new
