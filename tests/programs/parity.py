"""Training steps on any parallel layout: losses and whole gradients, as numbers to compare.

``python parity.py WORK N`` under torchrun runs every cell of WORK/cells-N.json and writes WORK/NAME.pt.
"""

import json
import sys
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from helpers import gradients, own_states
from helpers import train as helpers
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.training.global_vars import set_args, unset_global_variables
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hylo_megatron.config import Architecture
from hylo_megatron.config.stages import stage_kind
from hylo_megatron.convert.pair import padded_rows
from hylo_megatron.distill import batches
from hylo_megatron.distill.losses import JSD, KL, LayerDistance, loss_class
from hylo_megatron.distill.model import DistillModel
from hylo_megatron.distill.settings import DistillSettings
from hylo_megatron.engine.step_log import StepLog
from hylo_megatron.layers.fp8 import to_fp8
from hylo_megatron.layers.load import has_layout, layout_config, load_model, start_process_groups
from hylo_megatron.parallel.teacher_fed import TeacherFed

ROWS = 4
# kl and ce together, tempered, in chunks that do not divide the tokens, with a teacher for the first two thirds
END_TO_END = KL(kl_weight=0.7, ce_weight=0.3, temperature=2.0, chunk=50, teacher_length=40, ce_beyond=0.5)
LOSSES = {  # beside END_TO_END: each with every term
    "jsd": JSD(**vars(END_TO_END) | dict(beta=0.3, hidden_weight=2.0)),
    "hidden": replace(END_TO_END, reverse=True, hidden_weight=2.0, hidden_layers_weight=0.5, teacher_length=None),
    "early": replace(END_TO_END, ce_from=0.5),  # cross-entropy has no weight yet
}
DTYPES = {"fp32": torch.float32, "fp64": torch.float64, "bf16": torch.bfloat16}

LAYOUTS = {  # processes: name: sizes
    2: {
        "TP2": dict(tp=2),
        "TP2 SP": dict(tp=2, sp=True),
        "PP2": dict(pp=2),
        "CP2": dict(cp=2, linear_cp="a2a"),
        "CP2 ring, states": dict(cp=2, cp_comm_type="p2p", linear_cp="states"),
        "DP2": {},
        "DP2 optimizer": dict(distributed_optimizer=True),
    },
    4: {
        "PP4": dict(pp=4),
        "TP2 PP2": dict(tp=2, pp=2),
        "TP2 SP DP2 optimizer": dict(tp=2, sp=True, distributed_optimizer=True),
        "CP4 ring, states": dict(cp=4, cp_comm_type="p2p"),
        "TP2 SP CP2, states": dict(tp=2, cp=2, sp=True),
        "PP2 CP2 ring": dict(pp=2, cp=2, cp_comm_type="p2p", linear_cp="a2a"),
        "CP2 DP2 optimizer": dict(cp=2, linear_cp="a2a", distributed_optimizer=True),
    },
    8: {"TP2 PP2 CP2, states": dict(tp=2, pp=2, cp=2)},
    16: {"TP2 SP PP2 CP2 DP2 optimizer": dict(tp=2, pp=2, cp=2, sp=True, micro=1, distributed_optimizer=True)},
}


@dataclass
class Cell:
    """``student`` and ``teacher`` are checkpoints; ``train``: see ``DistillSettings``. ``steps``: of the optimizer,
    after the one whose gradient is kept: SGD, or Adam (which the distributed optimizer wants) with a large epsilon,
    since Adam proper turns rounding errors of gradients near zero into whole steps. ``noise``: see ``perturb``."""

    name: str
    student: str
    teacher: str
    stage: str
    train: str
    tp: int = 1
    pp: int = 1
    cp: int = 1
    sp: bool = False
    micro: int = 2
    cp_comm_type: str = "all_gather"
    linear_cp: str = "auto"
    distributed_optimizer: bool = False
    adam: bool = False
    dtype: str = "fp32"
    steps: int = 0
    length: int = helpers.SEQ
    noise: float = 0.0
    loss: str = ""
    recompute: int = 0  # sub-layers
    mlp_block: int | None = None
    teacher_fp8: bool = False
    recurrence_block: int | None = None


def recomputed(layers: int, method: str = "block") -> dict:
    """Return the fields of a config that recomputes ``layers`` sub-layers."""
    fields = dict(recompute_granularity="full", recompute_method=method, recompute_num_layers=layers)
    return fields if layers else {}


def distill_model(student, teacher, stage, train, loss=END_TO_END, config=None, dtype=torch.float32,
                  linear_cp="auto", mlp_block=None, teacher_fp8=False,
                  recurrence_block=None) -> DistillModel:  # fmt: skip
    """Build a ``DistillModel`` of two checkpoints on the current process groups.

    ``loss`` is for end-to-end stages; ``config`` has fields of both models' configs.
    """
    kind = stage_kind(stage)
    loss = LayerDistance() if kind.layerwise else loss
    settings = DistillSettings(kind=kind, train=train, loss=loss, recurrence_block=recurrence_block)
    archs = [Architecture.load(folder) for folder in (student, teacher)]
    rows = padded_rows(*archs, parallel_state.get_tensor_model_parallel_world_size())
    models = [
        load_model(
            folder, layout_config(arch, dtype, **(config or {})), rows, linear_cp=linear_cp, mlp_block=mlp_block
        )
        for folder, arch in zip((student, teacher), archs, strict=True)
    ]
    for model, _ in models:
        if dtype == torch.float64:  # not model.double(): the decay parameters would stay as they are
            for parameter in model.parameters():
                parameter.data = parameter.data.double()
        elif dtype == torch.bfloat16:
            model.bfloat16()
    (a, a_arch), (b, b_arch) = models
    if teacher_fp8:
        to_fp8(b)
    return DistillModel(a, b, a_arch, b_arch, settings)


def perturb(model: DistillModel, relative: float) -> None:
    """Moves every weight by noise of that size: 3e-8 is about what storing it in fp32 may change."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1 + relative * torch.randn(parameter.shape, generator=generator))


def sample_rows(rank: int, size: int, micro: int, length: int = helpers.SEQ):
    """Micro-batches of one data-parallel rank, step after step, with a mask that differs from row to row."""
    step = 0
    while True:
        batch = helpers.token_batch(ROWS, length, seed=3 + step)
        for start in range(rank * micro, ROWS, size * micro):
            yield {key: value[start : start + micro] for key, value in batch.items()}
        step += 1


def build(cell: Cell):
    """``(DistillModel, what DDP made of it, optimizer)`` as ``megatron.training`` has them."""
    if not has_layout(cell.tp, cell.pp, cell.cp):
        helpers.close_groups()
    start_process_groups(cell.tp, cell.pp, cell.cp)
    unset_global_variables()
    set_args(SimpleNamespace(hylo_stage=cell.stage))
    dtype = DTYPES[cell.dtype]
    loss = LOSSES.get(cell.loss, END_TO_END)
    model = distill_model(
        cell.student, cell.teacher, cell.stage, cell.train, loss, dtype=dtype, linear_cp=cell.linear_cp,
        mlp_block=cell.mlp_block, teacher_fp8=cell.teacher_fp8, recurrence_block=cell.recurrence_block,
        config=recomputed(cell.recompute) | dict(
            sequence_parallel=cell.sp, cp_comm_type=cell.cp_comm_type, calculate_per_token_loss=True,
            deallocate_pipeline_outputs=True, finalize_model_grads_func=finalize_model_grads,
        ),
    ).to(torch.cuda.current_device())  # fmt: skip
    if cell.noise:
        perturb(model, cell.noise)
    settings = DistributedDataParallelConfig(
        grad_reduce_in_fp32=dtype != torch.float64, use_distributed_optimizer=cell.distributed_optimizer,
        overlap_grad_reduce=cell.distributed_optimizer, bucket_size=4000 if cell.distributed_optimizer else None,
    )  # fmt: skip
    wrapped = DistributedDataParallel(model.config, settings, model)
    if cell.distributed_optimizer:
        model.config.no_sync_func = wrapped.no_sync
    kind = dict(optimizer="adam", adam_eps=1.0) if cell.adam else dict(optimizer="sgd", sgd_momentum=0.9)
    optimizer = cell.steps and get_megatron_optimizer(
        OptimizerConfig(**kind, lr=2.0 if cell.adam else 0.2, clip_grad=1.0, weight_decay=0.01,
                        use_distributed_optimizer=cell.distributed_optimizer),
        [wrapped],
    )  # fmt: skip
    return model, wrapped, optimizer


def logged_losses(stored: list[dict]) -> dict:
    """Means over everybody's tokens, as ``megatron.training`` makes them."""
    losses = {}
    for name in stored[0] if stored else ():
        total = torch.stack([entry[name] for entry in stored]).sum(0)
        dist.all_reduce(total, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
        losses[name] = total[0] / total[1]
    return losses


def run_cell(cell: Cell, log_path: Path) -> dict:
    """Steps as ``megatron.training`` takes them: schedule, loss function, gradient reduction, optimizer, log line."""
    model, wrapped, optimizer = build(cell)
    rank, size = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
    arguments = dict(hylo_stage=cell.stage, global_batch_size=ROWS, seq_length=cell.length, hylo_log=str(log_path))
    log = StepLog(SimpleNamespace(save=None, **arguments), [model])
    schedule = TeacherFed() if cell.stage == "ild" and cell.pp > 1 else get_forward_backward_func()
    rows, result = sample_rows(rank, size, cell.micro, cell.length), {"cell": asdict(cell)}
    for step in range(1 + cell.steps):
        wrapped.zero_grad_buffer()
        if optimizer:
            optimizer.zero_grad()
        stored = schedule(
            forward_step_func=batches.forward_step, data_iterator=rows, model=[wrapped],
            num_microbatches=ROWS // cell.micro // size, seq_length=cell.length, micro_batch_size=cell.micro,
            forward_only=False,
        )  # fmt: skip
        if step == 0:  # with all their digits, which the log does not have
            layerwise = model.settings.kind.layerwise
            taken = (model.layer_sums_LP.clone(), model.layer_tokens.clone()) if layerwise else None
            result["layers"] = log.layer_means().tolist() if layerwise else None
            if layerwise:
                model.layer_sums_LP += taken[0]
                model.layer_tokens += taken[1]
        log.note(logged_losses(stored), step + 1, 0.1, None)
        log.flush()
        if step == 0:
            if cell.distributed_optimizer:
                gradients.gather(wrapped)
            result["gradients"], result["spread"] = gradients.whole(model)
        if optimizer:
            optimizer.step()
    if optimizer and cell.distributed_optimizer:
        own_states.check(optimizer, model)
    return result


def loss_gap(line: dict, expected: dict) -> float:
    names = {key for key in expected if key == "loss" or key in loss_class(stage_kind(expected["stage"])).parts}
    assert len(names) == 3
    return max(abs(line[key] - expected[key]) / expected[key] for key in names)


class RefuseViews(TorchDispatchMode):
    """Collectives of tensors that are not contiguous are errors, as with NCCL; gloo takes them."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            leaves = tree_leaves((args, kwargs))
            assert all(x.is_contiguous() for x in leaves if isinstance(x, torch.Tensor)), f"{func} of a view"
        return func(*args, **(kwargs or {}))


def main(work: Path, launch: str) -> None:
    for values in json.loads((work / f"cells-{launch}.json").read_text()):
        cell = Cell(**values)
        with RefuseViews():
            result = run_cell(cell, work / f"{cell.name}.jsonl")
        if dist.get_rank() == 0:
            torch.save(result, work / f"{cell.name}.pt")
            print(f"done {cell.name}", flush=True)
    helpers.end_processes()


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
