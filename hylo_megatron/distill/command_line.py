"""The command line of training before anything starts: what it lacks is filled in, what cannot work is refused."""

import argparse
import os
import sys
from pathlib import Path

from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import ParallelLayout, Work, check_parallel_layout
from hylo_megatron.config.pair import check_pair
from hylo_megatron.distill.arguments import add_hylo_arguments, engine_flags, run_architecture
from hylo_megatron.errors import HyLoError


def async_flags() -> list[str]:
    """The engine turns ``--async-save`` off without the first. Its default, nvidia-resiliency-ext, has another
    writer, which nobody would see die; ``platform/checkpoint_writer.py`` watches this one."""
    return ["--use-persistent-ckpt-worker", "--async-strategy", "mcore"]


def check_keep_last(keep: int | None, user: list[str]) -> None:
    if keep is None:
        return
    if keep < 1:
        raise HyLoError(f"--hylo-keep-last {keep}: at least one checkpoint has to stay; leave it out to keep all")
    if "--save-retain-interval" in user:
        raise HyLoError("--hylo-keep-last and --save-retain-interval both delete checkpoints; choose one")


def _known(user: list[str]) -> argparse.Namespace:
    """Of Megatron's flags and ours, those that the checks need."""
    parser = argparse.ArgumentParser(add_help=False, exit_on_error=False, allow_abbrev=False)
    add = parser.add_argument
    for name in ("--hylo-student", "--hylo-teacher", "--hylo-stage", "--save"):
        add(name)
    for name in ("--seq-length", "--global-batch-size"):
        add(name, type=int, default=0)
    for name in ("--tensor-model-parallel-size", "--pipeline-model-parallel-size", "--context-parallel-size",
                 "--micro-batch-size"):  # fmt: skip
        add(name, type=int, default=1)
    for name in ("--num-layers-per-virtual-pipeline-stage", "--num-virtual-stages-per-pipeline-rank"):
        add(name, dest="virtual_stages")
    add("--sequence-parallel", action="store_true")
    add("--hylo-linear-cp", default="auto")
    add("--hylo-keep-last", type=int)
    add("--async-save", action="store_true")
    return parser.parse_known_args(user)[0]


def check_models(known: argparse.Namespace, student: Architecture) -> None:
    """Teacher, and the layout for both. Raises ``HyLoError``."""
    if not known.hylo_teacher:
        raise HyLoError("--hylo-teacher is missing: the Transformer's checkpoint made by convert_hf_to_megatron.py")
    teacher = Architecture.load(known.hylo_teacher)
    check_pair(student, teacher, known.hylo_stage, (Path(known.hylo_student), Path(known.hylo_teacher)))
    if known.hylo_stage == "ild" and known.virtual_stages:
        raise HyLoError("--hylo-stage ild has a pipeline schedule of its own: leave virtual pipeline stages out")
    layout = ParallelLayout(
        known.tensor_model_parallel_size, known.pipeline_model_parallel_size, known.context_parallel_size,
        known.sequence_parallel, known.hylo_linear_cp,
    )  # fmt: skip
    processes = int(os.environ.get("WORLD_SIZE", 1))
    work = Work(processes, known.seq_length, known.micro_batch_size, known.global_batch_size)
    check_parallel_layout({"student": student, "teacher": teacher}, layout, work)


def prepare_command_line() -> Architecture:
    """Puts the student's flags in front of the user's in ``sys.argv``. Raises ``HyLoError`` before anything starts."""
    user = sys.argv[1:]
    if {"-h", "--help"} & set(user):
        ours = add_hylo_arguments(argparse.ArgumentParser(add_help=False))
        print("python -m hylo_megatron.train: all of Megatron's flags, and\n" + ours.format_help())
        sys.exit(0)
    known = _known(user)
    if not known.hylo_student:
        raise HyLoError("--hylo-student is missing: the student checkpoint made by upcycle.py")
    arch = run_architecture(known.hylo_student, seq_length=known.seq_length)
    if not arch.is_hybrid:
        raise HyLoError(f"--hylo-student {known.hylo_student} is a Transformer; run upcycle.py on it first")
    check_models(known, arch)
    check_keep_last(known.hylo_keep_last, user)
    flags = engine_flags(arch, Path(known.hylo_student) / "hf") + (async_flags() if known.async_save else [])
    # A run resumes from its own folder when that holds a checkpoint, else it starts from the student's weights.
    flags += ["--pretrained-checkpoint", known.hylo_student]
    if known.save and "--load" not in user:
        flags += ["--load", known.save]
    sys.argv[1:] = flags + user
    return arch
