"""Flags of megatron-core that with our layers train wrongly, fail late, or change nothing."""

import argparse

from hylo_megatron.config.stages import stage_kind
from hylo_megatron.errors import HyLoError

_LATE = "is not supported: layers here read weights that megatron-core would not have gathered by then; leave it out"
_SIXTEEN = "is not supported: weights and attention stay in 16 bits; leave it out"
REFUSED = {
    "--transformer-impl": "has no effect here: --hylo-backend says which layers are built",
    "--overlap-param-gather": _LATE,
    "--overlap-param-gather-with-optimizer-step": _LATE,
    "--optimizer-cuda-graph": "is not supported: the learning rate would stay as it was captured; leave it out",
    "--fp8-param-gather": _SIXTEEN,
    "--fp4-format": _SIXTEEN,
    "--fp4-param-gather": _SIXTEEN,
    "--fp8-dot-product-attention": _SIXTEEN,
    "--fp8-multi-head-attention": _SIXTEEN,
}
SCHEDULES = ("--step-batch-size-schedule", "--rampup-batch-size")  # of the number of micro-batches


def check_megatron_flags(known: argparse.Namespace, user: list[str]) -> None:
    """Raise ``HyLoError`` for a flag of ``user`` that is refused, alone or beside another one."""
    words = [word.partition("=")[0] for word in user]
    if refused := next((flag for flag in REFUSED if flag in words), None):
        raise HyLoError(f"{refused} {REFUSED[refused]}")
    if known.fp16 and not known.bf16:
        raise HyLoError("--fp16: training in fp16 is not supported; give --bf16, or none of the two for fp32")
    if known.check_for_spiky_loss:
        raise HyLoError("--check-for-spiky-loss has no effect here: --hylo-on-spike and --hylo-spike-factor do this")
    if known.optimizer_cpu_offload:
        raise HyLoError("--optimizer-cpu-offload steps on the CPU and is not supported; use --hylo-offload-optimizer")
    layerwise = stage_kind(known.hylo_stage).layerwise
    if known.cuda_graph_impl == "full_iteration":
        _check_graph(known, words, layerwise)
    if "--fp8-format" in words:
        _check_fp8(known, layerwise)


def _check_graph(known: argparse.Namespace, words: list[str], layerwise: bool) -> None:
    """Refuse what changes between steps, and sends that no stage waits for."""
    if schedule := next((flag for flag in SCHEDULES if flag in words), None):
        raise HyLoError(
            f"{schedule}: --cuda-graph-impl full_iteration repeats the first step's number of micro-batches and drops"
            " the others; leave one of the two out"
        )
    if layerwise and known.pipeline_model_parallel_size > 1:
        raise HyLoError(
            f"--cuda-graph-impl full_iteration: --hylo-stage {known.hylo_stage} cannot be captured with"
            " --pipeline-model-parallel-size above 1; leave one of the two out"
        )


def _check_fp8(known: argparse.Namespace, layerwise: bool) -> None:
    """Refuse FP8 that the layers would ignore."""
    if known.hylo_backend == "local":
        raise HyLoError(
            "--fp8-format: torch's layers do not multiply in FP8; give --hylo-backend te too, or leave it out"
            " (--hylo-teacher-fp8 is for the teacher)"
        )
    if layerwise:  # only megatron-core's stack turns FP8 on
        raise HyLoError(
            f"--fp8-format: --hylo-stage {known.hylo_stage} runs each layer by itself, in 16 bits; leave it out"
        )
