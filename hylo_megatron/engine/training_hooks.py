"""Changes to the training loop of ``megatron.training``: parameter groups, schedule, a log line each step."""

import contextlib

from hylo_megatron.config.decisions import is_new
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.engine.patch import around, entries
from hylo_megatron.engine.training_run import TrainingRun
from hylo_megatron.mixers import FAST_SUFFIXES, FP32_SUFFIXES


def _is_decay(name: str) -> bool:
    return name.endswith(FAST_SUFFIXES)


def _is_other_fp32(name: str) -> bool:
    return name.endswith(FP32_SUFFIXES) and not _is_decay(name)


def learning_rate_groups(args) -> dict:
    """Return parameter groups: copied weights learn slowly, decay parameters, which start far from their end, fast.

    The fp32 parameters (decay, and others such as the skip connection of Mamba-2) always get groups of their own: in
    one with bf16 parameters the distributed optimizer mixes up their order, and the checkpoint cannot be saved
    (``distrib_optimizer.py:1353``).
    """
    from megatron.core.optimizer.optimizer_config import ParamKey, ParamWithNamePredicate

    groups = {}

    def add(label, matches, factor):
        key = ParamKey(with_name_predicate=ParamWithNamePredicate(label, lambda _, name: matches(name)))
        groups[key] = {"max_lr": args.lr * factor, "min_lr": (args.min_lr or 0.0) * factor}

    if args.hylo_copied_lr_mult != 1.0:
        add("hylo_copied", lambda name: args.hylo_control or not is_new(name), args.hylo_copied_lr_mult)
    add("hylo_decay", _is_decay, args.hylo_decay_lr_mult)
    add("hylo_skip", _is_other_fp32, 1.0)
    return groups


@around
def with_groups(configure, run: TrainingRun, args):
    config, overrides = configure(args)
    return config, {**overrides, **learning_rate_groups(args)}


def without_states(args, optimizer, run: TrainingRun) -> contextlib.AbstractContextManager:
    """Keep the optimizer's states on the host during the passes of a step, if asked."""
    from hylo_megatron.distill.host_memory import OptimizerAway

    if not args.hylo_offload_optimizer:
        return contextlib.nullcontext()
    run.offload = run.offload or OptimizerAway()
    return run.offload.during_passes(optimizer)


@around
def with_step_start(train_step, run: TrainingRun, forward_step, data, models, optimizer, scheduler, config, schedule,
                    **kwargs):  # fmt: skip
    """Tell the models the number of the step, then take it, with the guard's gate if asked."""
    from megatron.training import get_args

    from hylo_megatron.engine.guard import Guard

    args = get_args()
    if run.profile:
        run.profile.begin_step(kwargs["iteration"])
    phases = [model.begin_step(kwargs["iteration"], args.train_iters) for model in run.models]
    run.guard = run.guard or Guard(args, run.models[0].settings.loss, run.data, run.guarded)
    if phases != run.guard.phase:
        run.flush_log()  # before the guard forgets the losses of the phase before
    run.guard.begin(phases)
    with without_states(args, optimizer, run), run.guard.gate(optimizer) as losses:

        def keep_losses(**batch):
            found = schedule(**batch)
            losses[:] = found or []
            return found

        result = train_step(forward_step, data, models, optimizer, scheduler, config, keep_losses, **kwargs)
    run.guard.after(models, optimizer, scheduler, run.home)
    if run.guard.wrong is not None:
        for model in run.models:
            model.forget_states()
    should_exit, code = result[3:5]
    if should_exit:
        run.flush_log()
        run.guard.failed_check(kwargs["iteration"] + 1, code)
    return result


def _count(total: dict, losses: dict, skipped: int) -> None:
    """Add a step to megatron's sums, as ``training_log`` does."""
    for name, more in (("advanced iterations", 1 - skipped), ("skipped iterations", skipped), ("nan iterations", 0)):
        total[name] = total.get(name, 0) + more
    for name, loss in losses.items():
        total[name] = total[name] + loss if name in total else loss.view(1)


def _is_told(args, iteration: int, skipped: int, **kwargs) -> bool:
    """Return whether megatron's own log has something to say about this step."""
    from megatron.training import get_tensorboard_writer

    regular = iteration % args.log_interval == 0 or kwargs.get("is_first_iteration")
    return bool(regular or skipped or get_tensorboard_writer())


@around
def with_step_log(log, run: TrainingRun, losses, total, learning_rate, iteration, scale, report, skipped, grad_norm,
                  *rest, **kwargs):  # fmt: skip
    """Write a line of this product's own log, then call megatron's ``training_log``.

    A call of ``training_log`` waits for the GPU, so steps about which megatron prints nothing go without.
    """
    from megatron.training import get_args

    from hylo_megatron.engine.step_log import StepLog

    args = get_args()
    if run.log is None:
        run.log = StepLog(args, run.models, run.product_rate)
        run.log.truncate(iteration - 1)
    run.log.note(losses, iteration, learning_rate, grad_norm, run.guard)
    if not _is_told(args, iteration, skipped, **kwargs):
        _count(total, losses, skipped)
        return report
    return log(losses, total, learning_rate, iteration, scale, report, skipped, grad_norm, *rest, **kwargs)


@around
def teacher_fed_schedule(choose, run: TrainingRun, **kwargs):
    """Return megatron's choice of a schedule, or our own for a layer-wise stage in a pipeline."""
    from megatron.training import get_args

    from hylo_megatron.parallel.teacher_fed import TeacherFed

    args = get_args()
    if not stage_kind(args.hylo_stage).layerwise or args.pipeline_model_parallel_size == 1:
        return choose(**kwargs)
    run.schedule = run.schedule or TeacherFed()  # training and evaluation ask apart, and share it
    return run.schedule


_LOOP = "megatron.training.training"
PATCHES = entries(
    "training", "megatron-core",
    (f"{_LOOP}:get_forward_backward_func", teacher_fed_schedule, "(pp_size, vp_size, schedule_pg_collection)",
     "megatron has no schedule in which the teacher's stages feed the student's"),
    (f"{_LOOP}:get_megatron_optimizer_config", with_groups, "(args)",
     "the loop takes no parameter groups of its user; fp32 and bf16 parameters in one group cannot be saved"
     " (megatron/core/optimizer/distrib_optimizer.py:1353)"),
    (f"{_LOOP}:train_step", with_step_start, "(forward_step_func, data_iterator, model, optimizer, ... 10, 3bb2572e)",
     "the loop has no callback before a step, where weights of the loss change with its number"),
    (f"{_LOOP}:training_log", with_step_log,
     "(loss_dict, total_loss_dict, learning_rate, iteration, ... 15, 1a70c299)",
     "the loop has no callback after a step that knows losses and gradient norm"),
)  # fmt: skip
