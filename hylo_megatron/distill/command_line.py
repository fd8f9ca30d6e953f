"""The command line of training before anything starts: refuse what fails, add flags that follow from the student."""

import argparse
import contextlib
import math
import os
import sys
from pathlib import Path

from hylo_megatron.checkpoint.diverged import DIVERGED, why_diverged
from hylo_megatron.checkpoint.iterations import complete_iterations, latest
from hylo_megatron.checkpoint.read_ahead import read_ahead
from hylo_megatron.config import Architecture
from hylo_megatron.config.decisions import CHUNK
from hylo_megatron.config.layout import ParallelLayout, Work, check_exchange, check_parallel_layout
from hylo_megatron.config.stages import STAGE_KINDS, stage_kind
from hylo_megatron.convert.pair import check_pair
from hylo_megatron.data.data_check import check_data, prefixes
from hylo_megatron.distill.arguments import add_hylo_arguments, engine_flags, run_architecture, student_architecture
from hylo_megatron.distill.first_flags import first_flags, limited
from hylo_megatron.distill.losses import check_levers, loss_of
from hylo_megatron.distill.memory_check import check_memory, planned_run
from hylo_megatron.distill.refused_flags import check_megatron_flags
from hylo_megatron.distill.resume import check_save
from hylo_megatron.distill.spikes import GATES, SpikeSettings
from hylo_megatron.engine.step_profile import LEAST_STEPS
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, given
from hylo_megatron.options import from_options

# Flags that ``--async-save`` needs. megatron turns it off without the first one. The default of the second,
# nvidia-resiliency-ext, has a writer whose death would go unnoticed; ``engine/checkpoint_writer.py`` watches mcore's.
ASYNC = ["--use-persistent-ckpt-worker", "--async-strategy", "mcore"]


def user_flags(user: list[str]) -> argparse.Namespace:
    """Return ``user`` as parsed by Megatron and by us. Raises ``HyLoError`` for a flag or value that is refused.

    ``given`` of the result has the names of the flags that ``user`` has.
    """
    from megatron.training.arguments import add_megatron_arguments

    parser = Parser(add_help=False, allow_abbrev=False)
    limited(add_hylo_arguments(add_megatron_arguments(parser)))
    return argparse.Namespace(**vars(parser.parse_args(user)), given=given(parser, user))


def _data(known: argparse.Namespace) -> object:
    """Return the flag that says where tokens come from, or None: Megatron would train on random tokens unasked."""
    names = ("data_path", "train_data_path", "data_args_path", "per_split_data_args_path")
    return next(filter(None, (getattr(known, name) for name in names)), known.mock_data or None)


def _check_blends(known: argparse.Namespace) -> None:
    """Refuse weights that cannot work. Megatron reads every other word as a weight if all of these are numbers."""
    for flag in ("data_path", "train_data_path", "valid_data_path", "test_data_path"):
        words = getattr(known, flag) or ()
        for word in words[::2] if len(words) % 2 == 0 else ():
            with contextlib.suppress(ValueError):
                if not 0 < float(word) < math.inf:
                    raise HyLoError(f"--{flag.replace('_', '-')}: weight {word}, expected a number above 0")


def check_stage(known: argparse.Namespace) -> None:
    """Raise ``HyLoError`` for flags of a stage that its loss does not have, or that the guard cannot work with."""
    check_levers(stage_kind(known.hylo_stage), known)
    from_options(SpikeSettings, known)
    if known.hylo_on_spike == "rollback" and known.no_save_optim:
        raise HyLoError("--hylo-on-spike rollback needs the optimizer of checkpoints: leave --no-save-optim out")


def check_recurrence_block(known: argparse.Namespace, student: Architecture) -> None:
    block, flag = known.hylo_recurrence_block, f"--hylo-recurrence-block {known.hylo_recurrence_block}"
    if not block:
        return
    if block % CHUNK:
        raise HyLoError(f"{flag}: expected a multiple of {CHUNK}, the tokens that the kernels work on at once")
    if not {"gdn", "kda"} & set(student.plan):
        raise HyLoError(f"{flag}: the student has no GDN or KDA block, whose recurrence this is; leave it out")
    if known.hylo_initial_states != "zero":
        raise HyLoError(f"{flag} works with --hylo-initial-states zero; leave one of them out")


def check_teacher_and_memory(known: argparse.Namespace) -> None:
    """Refuse FP8 where it does not help, and to move tensors away beside a CUDA graph."""
    graph = known.cuda_graph_impl
    for what in ("teacher", "optimizer"):
        if getattr(known, f"hylo_offload_{what}") and graph not in (None, "none"):
            raise HyLoError(
                f"--hylo-offload-{what}: --cuda-graph-impl {graph} needs all tensors to stay in their places;"
                " leave one of the two out"
            )
    if known.hylo_teacher_fp8 and stage_kind(known.hylo_stage).layerwise:
        raise HyLoError(f"--hylo-teacher-fp8: --hylo-stage {known.hylo_stage} would learn its rounding; leave it out")


def check_given(known: argparse.Namespace, user: list[str]) -> None:
    missing = {
        "--hylo-student": (known.hylo_student, "the student checkpoint made by hylo upcycle"),
        "--hylo-teacher": (known.hylo_teacher, "the Transformer's checkpoint made by hylo convert"),
        "--hylo-stage": (known.hylo_stage, " or ".join(STAGE_KINDS)),
        "--lr": (known.lr, "the peak learning rate"),
        "--seq-length": (known.seq_length, "tokens of a sequence"),
        "--micro-batch-size": (known.micro_batch_size, "sequences of a rank at once"),
        "--train-iters": (known.train_iters or known.train_samples, "steps of the whole training"),
        "--data-path": (_data(known), "prefixes of token files (hylo prepare-data); --mock-data makes up tokens"),
    }
    for flag, (value, what) in missing.items():
        if value is None:
            raise HyLoError(f"{flag} is missing: {what}")
    if (
        "--eval-iters" in user
        and known.eval_iters
        and not (known.split or known.valid_data_path or known.per_split_data_args_path)
    ):
        raise HyLoError(f"--eval-iters {known.eval_iters}: no data to validate on; give --split, such as 99,1,0")
    check_megatron_flags(known, user)
    _check_blends(known)
    check_stage(known)
    _check_benchmark(known)
    check_teacher_and_memory(known)
    if known.hylo_on_spike == "rollback" and not known.save:
        raise HyLoError("--hylo-on-spike rollback: --save is missing, the folder with the checkpoints to go back to")
    steps = known.lr_decay_iters or known.train_iters or 0
    if steps and (known.lr_warmup_iters or 0) >= steps:
        raise HyLoError(f"--lr-warmup-iters {known.lr_warmup_iters}: expected fewer than the {steps} steps of the run")
    if known.hylo_keep_last and "--save-retain-interval" in user:
        raise HyLoError("--hylo-keep-last and --save-retain-interval both delete checkpoints; choose one")


def _check_benchmark(known: argparse.Namespace) -> None:
    """Refuse random weights beside flags for checkpoints, and a profile of fewer steps than it needs."""
    flags = ("--save", "--load", "--hylo-student-iteration")
    unused = next((flag for flag in flags if getattr(known, flag[2:].replace("-", "_"))), None)
    if known.hylo_random_weights and unused:
        raise HyLoError(
            f"{unused}: a benchmark with --hylo-random-weights loads and saves nothing; leave one of them out"
        )
    if known.hylo_profile and (known.train_iters or 0) < LEAST_STEPS:
        raise HyLoError(f"--hylo-profile: needs --train-iters of {LEAST_STEPS} or more, got {known.train_iters}")


def layout_of(known: argparse.Namespace) -> tuple[ParallelLayout, Work]:
    """Return the layout of a training, and what it divides."""
    layout = ParallelLayout(
        tp=known.tensor_model_parallel_size,
        pp=known.pipeline_model_parallel_size,
        cp=known.context_parallel_size,
        sequence_parallel=known.sequence_parallel,
        linear_cp=known.hylo_linear_cp,
        exchange=known.cp_comm_type[0],  # one for each layer where there are several; the planner counts the first
    )
    work = Work(
        processes=int(os.environ.get("WORLD_SIZE", 1)),
        seq_length=known.seq_length,
        micro_batch=known.micro_batch_size,
        global_batch=known.global_batch_size or 0,
    )
    return layout, work


def check_models(known: argparse.Namespace, student: Architecture) -> tuple[Architecture, ParallelLayout, Work]:
    """Return the teacher's architecture, the layout and what it divides.

    Raises ``HyLoError`` for a teacher that does not fit, or a layout that student or teacher does not fit.
    """
    teacher = Architecture.load(known.hylo_teacher)
    kind = stage_kind(known.hylo_stage)
    check_pair(student, teacher, kind, (Path(known.hylo_student), Path(known.hylo_teacher)))
    loss = loss_of(kind, known)
    loss.check(student, teacher, known.pipeline_model_parallel_size, bool(known.recompute_granularity))
    check_recurrence_block(known, student)
    for mode in known.cp_comm_type:
        check_exchange(mode)
    if known.hylo_initial_states != "zero" and known.context_parallel_size > 1:
        raise HyLoError(
            f"--hylo-initial-states {known.hylo_initial_states}: a sequence must be on one rank, and"
            f" --context-parallel-size is {known.context_parallel_size}; leave one of the two out"
        )
    virtual_stages = known.num_layers_per_virtual_pipeline_stage or known.num_virtual_stages_per_pipeline_rank
    if kind.layerwise and virtual_stages:
        raise HyLoError(f"--hylo-stage {kind.name} has a pipeline schedule of its own: omit virtual pipeline stages")
    layout, work = layout_of(known)
    check_parallel_layout({"student": student, "teacher": teacher}, layout, work)
    return teacher, layout, work


def check_control(known: argparse.Namespace, student: Architecture) -> None:
    """Refuse a Transformer as student unless ``--hylo-control`` asks for it, and what a control cannot train."""
    where = f"--hylo-student {known.hylo_student}"
    if not known.hylo_control:
        if not student.is_hybrid:
            raise HyLoError(
                f"{where} is a Transformer; run hylo upcycle on it first, or train it as a control by --hylo-control"
            )
        return
    if student.is_hybrid:
        raise HyLoError(f"{where} is a hybrid: --hylo-control trains a Transformer; leave the flag out")
    if known.hylo_initial_states != "zero":
        raise HyLoError("--hylo-initial-states: a Transformer has no linear blocks; leave it out with --hylo-control")
    kind = stage_kind(known.hylo_stage)
    if kind.layerwise:
        raise HyLoError(f"--hylo-control: --hylo-stage {kind.name} has nothing to align in a Transformer; use distill")
    if (known.hylo_train or kind.train) == "mixers":
        raise HyLoError("--hylo-control: a Transformer has no new mixers to train; use --hylo-train all")


def check_not_diverged(student: Path) -> None:
    if why := why_diverged(student):
        raise HyLoError(
            f"--hylo-student {student}: its training diverged ({why}); train it again, or remove"
            f" {student / DIVERGED} to take its last checkpoint"
        )


def check_weights(known: argparse.Namespace) -> None:
    """Raise ``HyLoError`` for a checkpoint without weights. The teacher's are read into memory from now on."""
    goes_on = any(folder and complete_iterations(folder) for folder in (known.load, known.save))
    if not (goes_on or known.hylo_student_iteration):
        latest(known.hylo_student, quiet=True)
    read_ahead(latest(known.hylo_teacher, quiet=True))


def check_command_line(user: list[str]) -> Architecture:
    """Return the student's architecture. Raises ``HyLoError`` for what can be refused without torch and Megatron.

    ``--help`` ends the program here.
    """
    if {"-h", "--help"} & set(user):
        ours = add_hylo_arguments(Parser(add_help=False))
        print("python -m hylo_megatron.train: all of Megatron's flags, and\n" + ours.format_help())
        sys.exit(0)
    known = first_flags(user)
    check_given(known, user)
    arch = run_architecture(known.hylo_student, seq_length=known.seq_length)
    check_control(known, arch)
    check_not_diverged(Path(known.hylo_student))
    teacher, layout, work = check_models(known, arch)
    check_save(known, student_architecture(known))
    if known.bf16:
        check_memory(planned_run(known, arch, teacher, layout, work), user)
    check_data(prefixes(known), arch, teacher, Path(known.hylo_student) / "hf", known.seq_length)
    if not known.hylo_random_weights:
        check_weights(known)
    return arch


# Flags of megatron-core's own check of the gradient, which repeats a step. Who gives one keeps that check.
REPEATING = {"rerun_mode", "check_for_large_grads", "error_injection_rate", "result_rejected_tracker_filename"}


def on_gpu() -> bool:
    import torch

    return torch.cuda.device_count() > 0


def guard_checks(known: argparse.Namespace) -> bool:
    """Return whether the guard alone finds values that are not finite.

    megatron-core's check would end the training before a guard with ``skip`` or ``rollback`` can decide. On a GPU it
    makes the host wait in each step, twice for each bucket of gradients and once for all ranks. The guard finds the
    same in the loss and in the norm over all ranks, one step late at most and before a checkpoint is saved. In a
    pipeline the log waits in any case.
    """
    if known.hylo_on_spike in GATES:
        return True
    return on_gpu() and known.pipeline_model_parallel_size == 1 and not REPEATING & known.given


def add_engine_flags(arch: Architecture) -> None:
    """Put the student's flags in front of the user's in ``sys.argv``. Raises ``HyLoError`` for a flag that Megatron
    does not know."""
    user = sys.argv[1:]
    known = user_flags(user)
    flags = engine_flags(arch, Path(known.hylo_student) / "hf") + (ASYNC if known.async_save else [])
    if guard_checks(known):
        flags += ["--no-check-for-nan-in-loss-and-grad"]
    if guard_checks(known) or not known.check_for_nan_in_loss_and_grad:
        flags += ["--rerun-mode", "disabled"]  # nothing asks for a step to be repeated, and asking waits for the GPU
    # A run resumes from --save if that folder holds a checkpoint, else it starts from the student's weights.
    if known.hylo_random_weights:
        flags += ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(arch.vocab_size)]
    else:
        flags += ["--pretrained-checkpoint", known.hylo_student]
    if known.save and "--load" not in user:
        flags += ["--load", known.save]
    sys.argv[1:] = flags + user
