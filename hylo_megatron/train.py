"""``torchrun ... -m hylo_megatron.train --hylo-stage ild|distill --hylo-student CKPT --hylo-teacher CKPT --save OUT``

The loop is megatron.training's, with all its flags. This file says which model, data and loss it runs.
"""

import contextlib
import copy
import functools
import os
import shutil
import sys
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING

from hylo_megatron.config import Architecture
from hylo_megatron.distill.command_line import add_engine_flags, check_command_line, layout_of
from hylo_megatron.engine.cudnn import load_own_cudnn, older_cudnn
from hylo_megatron.engine.kernel_cache import prepare_kernels
from hylo_megatron.engine.register import install
from hylo_megatron.engine.step_profile import StepProfile, end_without_cupti
from hylo_megatron.engine.tilelang_ahead import compile_beside
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import only_writer
from hylo_megatron.flags import command_line
from hylo_megatron.parent import bind_forks, die_with_parent, own_store, without_launcher

if TYPE_CHECKING:
    from hylo_megatron.checkpoint.save_room import SaveRoom
    from hylo_megatron.engine.training_run import TrainingRun


RUNNING = ".training"  # the file in --save that a training locks


def model_provider(
    run: "TrainingRun", pre_process=True, post_process=True, vp_stage=None, config=None, pg_collection=None
):
    import torch
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    from hylo_megatron.convert.pair import padded_rows
    from hylo_megatron.distill.arguments import run_architecture, student_architecture
    from hylo_megatron.distill.model import DistillModel
    from hylo_megatron.distill.settings import DistillSettings
    from hylo_megatron.engine import peers
    from hylo_megatron.layers.accumulation import accumulate_in_products
    from hylo_megatron.layers.fp8 import check_projections, refusing_widths, to_fp8
    from hylo_megatron.layers.load import load_weights
    from hylo_megatron.layers.model import UNFUSED, build_model, model_fields

    peers.connect()
    args = get_args()
    student_arch = student_architecture(args)
    teacher_arch = run_architecture(args.hylo_teacher, args.hylo_teacher_rope, args.seq_length)
    base = config or core_transformer_config_from_args(args)
    padded = padded_rows(student_arch, teacher_arch, args.tensor_model_parallel_size)

    def build(arch, backend, **overrides):
        own = copy.copy(base)
        for name, value in (model_fields(arch) | UNFUSED | overrides).items():
            setattr(own, name, value)
        return build_model(
            arch, own, padded_vocab_size=padded, pre_process=pre_process, post_process=post_process,
            pg_collection=pg_collection, vp_stage=vp_stage, backend=backend,
            linear_cp=args.hylo_linear_cp, mlp_block=args.hylo_mlp_block,
        )  # fmt: skip

    if args.hylo_random_weights:  # the same ones on any number of processes, without TP and PP
        torch.manual_seed(args.seed)
    with refusing_widths():
        student = build(student_arch, args.hylo_backend)
    if args.gradient_accumulation_fusion:
        accumulate_in_products(student)
    if args.fp8:
        check_projections(student)
    teacher_backend = "local" if args.hylo_teacher_fp8 else args.hylo_backend  # the flag has products of its own
    teacher = build(teacher_arch, teacher_backend, recompute_granularity=None, fp8=None)
    teacher.to(torch.cuda.current_device())
    if not args.hylo_random_weights:
        load_weights(teacher, args.hylo_teacher)
    if args.hylo_teacher_fp8:
        to_fp8(teacher)
    model = DistillModel(student, teacher, student_arch, teacher_arch, DistillSettings.of(args))
    run.models.append(model)
    return model


def write_companions(args) -> None:
    """Write architecture and tokenizer to the output folder, so that it is a checkpoint like any other."""
    from hylo_megatron.distill.arguments import student_architecture

    source, target = Path(args.hylo_student), Path(args.save)
    target.mkdir(parents=True, exist_ok=True)
    student_architecture(args).save(target)
    shutil.copytree(source / "hf", target / "hf", dirs_exist_ok=True)


def only_run(args) -> contextlib.AbstractContextManager:
    """Keep other trainings out of ``--save`` while this one runs: two would mix their checkpoints."""
    if not args.save or args.rank != 0:
        return contextlib.nullcontext()
    Path(args.save).mkdir(parents=True, exist_ok=True)
    return only_writer(Path(args.save) / RUNNING, f"--save {args.save}")


def wait_for_student(args) -> None:
    """Wait until the student's checkpoint is complete. Imports, flags and files are done with before."""
    from hylo_megatron.checkpoint.iterations import check_still_trains, trained_to

    parent = os.getppid()
    while not trained_to(args.hylo_student, args.hylo_student_iteration):
        if os.getppid() != parent:
            raise HyLoError("the process that started this one is gone")
        check_still_trains(Path(args.hylo_student), args.hylo_student_iteration)
        time.sleep(0.1)


def parsed_arguments():
    """Return Megatron's arguments. Raises ``HyLoError`` where Megatron asserts that two of them contradict."""
    from megatron.training.arguments import core_transformer_config_from_args, parse_and_validate_args

    from hylo_megatron.distill.arguments import add_hylo_arguments
    from hylo_megatron.distill.batches import check_dataloader

    try:
        args = parse_and_validate_args(extra_args_provider=add_hylo_arguments)
        core_transformer_config_from_args(args)  # has checks of its own, which would fail when models are built
    except (AssertionError, ValueError) as error:
        where = traceback.extract_tb(error.__traceback__)[-1]
        raise HyLoError(f"Megatron refuses these flags: {str(error) or where.line}") from error
    check_dataloader(args)
    args.hylo_rows = min(Architecture.load(path).vocab_size for path in (args.hylo_student, args.hylo_teacher))
    return args


def save_room(args, arch: Architecture) -> "SaveRoom | None":
    """Return the room for this training's checkpoints on the disk."""
    from hylo_megatron.checkpoint.save_room import SaveRoom, checkpoint_bytes
    from hylo_megatron.distill.settings import DistillSettings
    from hylo_megatron.engine import peers

    if not args.save:
        return None
    settings = DistillSettings.of(args)
    what = arch, settings.kind, settings.train, args.bf16
    last = checkpoint_bytes(*what, not (args.no_save_optim or args.hylo_last_weights_only))
    return SaveRoom(Path(args.save), checkpoint_bytes(*what, not args.no_save_optim), peers.fail, last)


def check_room(args, room: "SaveRoom | None") -> None:
    """Raise ``HyLoError`` on rank 0 if the first checkpoint cannot fit."""
    from hylo_megatron.checkpoint.iterations import trained_to

    steps = args.train_iters or 0
    if room and args.rank == 0 and steps and not trained_to(args.save, steps):
        room.check_start(-(-steps // (args.save_interval or steps)), args.hylo_keep_last)


def remembered(datasets, run: "TrainingRun"):
    """Return ``datasets``, which megatron calls, so that ``run`` knows the training's data set.

    In place of a data set megatron may get a loader, which has the data set.
    """

    @functools.wraps(datasets)
    def build(*args, **kwargs):
        built = datasets(*args, **kwargs)
        run.data = getattr(built[0], "reads", built[0])
        return built

    return build


def check_kernels(args, arch: Architecture) -> None:
    """Compare the GPU's kernels with their references. Raises ``HyLoError`` if one is wrong."""
    import torch

    from hylo_megatron.kernels.self_test import RankShape, self_test
    from hylo_megatron.parallel.self_test import attention_cases

    layout, work = layout_of(args)
    used = arch.linear_kind in arch.plan or layout.cp > 1
    if not torch.cuda.device_count() or not args.bf16 or args.no_self_test or not used:
        return
    torch.cuda.set_device(args.local_rank)
    device, teacher = torch.device("cuda", args.local_rank), Architecture.load(args.hylo_teacher)
    across = attention_cases([arch, teacher], layout, work, device)
    verdict = self_test(arch, RankShape.of(arch, layout, work), device, more=across)
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    if args.rank == 0:
        print(verdict, flush=True)


def get_ready(args, arch: Architecture, room: "SaveRoom | None") -> None:
    """Do what comes between the flags and the first step.

    The training that writes the student may use this GPU until it ends. Kernels are compared, and tuned by timing,
    only after that: they would slow that training, need its memory, and be timed wrongly beside it.
    """
    install("results")  # the queue is a process, which takes seconds to start
    if args.hylo_student_iteration:
        wait_for_student(args)  # the earlier stage has written its checkpoints by then
    check_room(args, room)
    check_kernels(args, arch)


@command_line
def main() -> None:
    """Train. Flags and files are checked before Megatron is imported, room on the disk before a kernel is compiled."""
    die_with_parent()
    bind_forks()
    without_launcher()
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")  # megatron asserts it for TP and CP
    arch = check_command_line(sys.argv[1:])
    prepare_kernels()
    compile_beside(arch, sys.argv[1:])
    load_own_cudnn()
    install("megatron")
    add_engine_flags(arch)
    from hylo_megatron.layers.fp8 import check_card
    from hylo_megatron.layers.specs import check_cuda

    args = parsed_arguments()
    for flag, given in (("--hylo-teacher-fp8", args.hylo_teacher_fp8), ("--fp8-format", args.fp8)):
        if given:
            check_card(flag)
    if args.hylo_backend == "te":
        check_cuda()
    with only_run(args):
        run_training(args, arch)
    if args.hylo_profile:
        end_without_cupti()


def run_training(args, arch: Architecture) -> None:
    """Train the student ``arch`` by Megatron's arguments."""
    import torch
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import pretrain_cfg_container_from_args

    from hylo_megatron.distill.batches import datasets, forward_step
    from hylo_megatron.engine.ending import ending_together
    from hylo_megatron.engine.product_rate import product_rate
    from hylo_megatron.engine.training_run import TrainingRun

    if args.save and args.rank == 0:
        write_companions(args)
    run = TrainingRun(room=save_room(args, arch))
    if torch.cuda.device_count() and args.rank == 0 and (older := older_cudnn()):
        print(f"warning: {older}", file=sys.stderr, flush=True)
    get_ready(args, arch, run.room)
    if torch.cuda.device_count():
        run.product_rate = product_rate(torch.device("cuda", args.local_rank))
    if args.hylo_profile:
        run.profile = StepProfile(Path(args.hylo_profile), args.train_iters)
    install("training", run)
    config = pretrain_cfg_container_from_args(args)
    with ending_together(args.save, run.room and run.room.need), run.logged():
        pretrain(
            config, remembered(datasets, run), ModelType.encoder_or_decoder, forward_step,
            lambda **kwargs: model_provider(run, **kwargs), store=own_store(),
        )  # fmt: skip


if __name__ == "__main__":
    main()
