"""Bytes that autograd keeps on a GPU, counted on a CPU: ``python activation_bytes.py`` prints JSON.

The layers, fla's autograd functions and our Triton ones run as they are, but their kernels do nothing: what is saved
and what is alive does not depend on values, which the tensors here do not have. Other ranks are made up (torch's fake
process group). ``HALVES`` and ``STEPS`` say what is counted; ``test_training_memory.py`` compares.
"""

import itertools
import json
import weakref
from dataclasses import dataclass, replace

import torch
import torch.distributed as dist
from helpers import tiny
from helpers.pretend_gpu import pretend_gpu
from torch.utils._python_dispatch import TorchDispatchMode

from hylo_megatron.config import GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry
from hylo_megatron.mixers.kda.geometry import KDAGeometry

# Every width another, so that no term can stand for another; heads divide by two.
GEOMETRY = Geometry(MLAGeometry(48, 24, 16, 32), GDNGeometry(4, 8, 24, 40), Mamba2Geometry(8, 20, 28, 4),
                    KDAGeometry(6, 36))  # fmt: skip
WIDE_VALUES = replace(GEOMETRY, mla=MLAGeometry(48, 24, 16, 40, q_lora_rank=72), mamba2=Mamba2Geometry(6, 24, 32, 6))
SIZES = dict(hidden_size=208, intermediate_size=352, num_attention_heads=4, num_key_value_heads=2, head_dim=32)
LENGTH, ROWS = 1024, 2
LAYOUTS = {
    "alone": {}, "tp": dict(tp=2), "tp sp": dict(tp=2, sequence_parallel=True), "cp a2a": dict(cp=2, linear_cp="a2a"),
    "cp states": dict(cp=2, linear_cp="states"),
}  # fmt: skip
KINDS = ("mla", "gdn", "mamba2", "kda")
HALVES = [(layout, kind, wide, "all") for layout in LAYOUTS for kind in KINDS for wide in (False, True)]
HALVES += [("alone", kind, False, "mixers") for kind in KINDS]
WINDOW = {"size": 96, "sinks": 5}
HALVES += [("tp", "gdn window", False, "all"), ("alone", "mamba2 window", True, "all")]
HALVES += [("tp", "mla window", False, "all"), ("tp sp", "mla window", True, "all")]
HALVES += [("cp states", "gdn window", False, "all"), ("cp a2a", "mamba2 window", True, "all")]
HALVES += [("cp states", "mla window", False, "all")]


@dataclass(frozen=True)
class Step:
    """A step of a whole model; ``teacher_layers``: another teacher than the base."""

    name: str
    linear: str
    stage: str
    train: str
    recompute: int = 0
    teacher_length: int | None = None
    teacher_layers: int = 0
    mlp_block: int | None = None
    recompute_chunk: int = 0
    recurrence_block: int | None = None
    cp: int = 1
    linear_cp: str = "states"


STEPS = [
    Step("distill", "gdn", "distill", "all"),
    Step("long", "mamba2", "distill", "all", recompute=3, teacher_length=1500),
    Step("all again", "gdn", "distill", "all", recompute=8, teacher_layers=6),
    Step("mixers", "gdn", "distill", "mixers"),
    Step("ild", "mamba2", "ild", "mixers"),
    Step("ild all", "gdn", "ild", "all"),
    Step("ild window", "gdn window", "ild", "mixers"),
    Step("ild all window", "gdn window", "ild", "all"),
    Step("window", "gdn window", "distill", "all"),
    Step("distill kda", "kda", "distill", "all"),
    Step("kda again", "kda", "distill", "all", recompute=8),
    Step("blocks", "gdn", "distill", "all", recompute=8, teacher_layers=6, mlp_block=600),
    Step("pairs", "mamba2", "distill", "all", recompute_chunk=2),
    Step("pairs, blocks", "gdn", "distill", "all", recompute_chunk=2, mlp_block=600),
    Step("segments", "gdn", "distill", "all", recompute=8, mlp_block=600, recurrence_block=1024),
    Step("segments kda", "kda", "distill", "all", recompute=8, mlp_block=600, recurrence_block=1024),
    Step("some blocks", "kda", "distill", "mixers", recompute=4, mlp_block=1024),
    Step("cp", "gdn", "distill", "all", recompute=8, cp=2),
    Step("cp kda", "kda", "distill", "all", recompute=8, cp=2),
    Step("cp segments", "gdn", "distill", "all", recompute=8, mlp_block=600, recurrence_block=256, cp=2),
    Step("cp segments kda", "kda", "distill", "all", recompute=8, mlp_block=600, recurrence_block=256, cp=2),
    *(Step(f"a2a segments {kind}", kind, "distill", "all", recompute=8, mlp_block=600, recurrence_block=1024, cp=2,
           linear_cp="a2a") for kind in ("gdn", "kda")),
]  # fmt: skip
PP = 4
PIPELINES = [  # stage of training, of the pipeline, micro-batches
    ("distill", 0, 6), ("distill", 1, 6), ("distill", 1, 2), ("distill", 3, 6), ("ild", 0, 6), ("ild", 1, 6),
    ("ild", 3, 6),
]  # fmt: skip
STEP_LENGTH, CHUNK, VOCAB = 4096, 1024, 2000


def half_arch(kind: str, wide: bool):
    """``wide``: MLA's values as wide as its keys, norms and a query rank; a Mamba-2 group for each head."""
    kind, *window = kind.split()
    changes = dict(window=WINDOW | ({"mla": True} if kind == "mla" else {})) if window else {}
    geometry = WIDE_VALUES if wide else GEOMETRY
    return tiny.hybrid(plan=(kind,), geometry=geometry, mla_qk_norm=wide, **SIZES, **changes)


def step_models(step: Step):
    linear, *window = step.linear.split()
    changes = dict(vocab_size=VOCAB) | (dict(window=WINDOW | {"mla": True}) if window else {})
    student = tiny.hybrid(linear, geometry=GEOMETRY, **(SIZES | changes))
    teacher = student.as_teacher()
    if step.teacher_layers:
        teacher = replace(teacher, hidden_size=320, intermediate_size=640, plan=("attention",) * step.teacher_layers)
    return student, teacher


def step_loss(step: Step):
    from hylo_megatron.distill.losses import KL, LayerDistance

    return LayerDistance() if step.stage == "ild" else KL(chunk=CHUNK, teacher_length=step.teacher_length)


def start(tp: int = 1, pp: int = 1, cp: int = 1, rank: int = 0, **_) -> None:
    """A rank of a world of made-up ones."""
    from megatron.core import parallel_state
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    dist.init_process_group("fake", rank=rank, world_size=tp * pp * cp, store=FakeStore())
    parallel_state.initialize_model_parallel(tp, pp, context_parallel_size=cp, create_gloo_process_groups=False)


def build(arch, **overrides):
    from hylo_megatron.layers.load import layout_config
    from hylo_megatron.layers.model import build_model

    ours = ("linear_cp", "mlp_block", "pre_process", "post_process")
    rest = {key: overrides.pop(key) for key in ours if key in overrides}
    config = layout_config(arch, torch.bfloat16, deallocate_pipeline_outputs=True, **overrides)
    return build_model(arch, config, **rest)


def saved_bytes(module, x: torch.Tensor) -> int:
    """That a forward pass saves, each storage once, weights left out."""
    weights = {p.untyped_storage()._cdata for p in module.parameters()}
    found = {}

    def pack(t):
        found[t.untyped_storage()._cdata] = t  # kept, so that no other takes its place
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        out = module(hidden_states=x, attention_mask=None)
    del out
    return sum(t.untyped_storage().nbytes() for key, t in found.items() if key not in weights)


def count_halves() -> list[list[int]]:
    from hylo_megatron.config.decisions import is_new

    counts = []
    for name, kind, wide, train in HALVES:
        layout = LAYOUTS[name]
        start(**layout)
        arch = half_arch(kind, wide)
        choices = {key: layout[key] for key in ("sequence_parallel", "linear_cp") if key in layout}
        model = build(arch, **choices)
        for key, parameter in model.named_parameters():
            parameter.requires_grad_(train == "all" or is_new(key))
        cut = layout.get("cp", 1) * (layout.get("tp", 1) if layout.get("sequence_parallel") else 1)
        x = torch.zeros(LENGTH // cut, ROWS, arch.hidden_size, dtype=torch.bfloat16).requires_grad_()
        counts.append([saved_bytes(layer, x) for layer in model.decoder.layers])
    return counts


class Alive(TorchDispatchMode):
    """Bytes of the storages that are alive, and the most there were; ``ignored`` are not counted."""

    def __init__(self, ignored):
        super().__init__()
        self.now = self.most = 0
        self.known = {t.untyped_storage()._cdata: t for t in ignored}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in torch.utils._pytree.tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage) -> None:
        if storage._cdata not in self.known:
            self.known[storage._cdata] = None
            self.now += storage.nbytes()
            self.most = max(self.most, self.now)
            weakref.finalize(storage, self._gone, storage._cdata, storage.nbytes())

    def _gone(self, key: int, size: int) -> None:
        self.now -= size
        del self.known[key]


def drop_gradient(parameter) -> None:
    parameter.grad = None  # as the engine, which has added it to its buffer


def distill_model(step: Step, **overrides):
    from hylo_megatron.config.stages import stage_kind
    from hylo_megatron.distill.model import DistillModel
    from hylo_megatron.distill.settings import DistillSettings

    student, teacher = step_models(step)
    method, layers = ("uniform", step.recompute_chunk) if step.recompute_chunk else ("block", step.recompute)
    recompute = dict(recompute_granularity="full", recompute_method=method, recompute_num_layers=layers)
    overrides |= dict(mlp_block=step.mlp_block) | (dict(linear_cp=step.linear_cp) if step.cp > 1 else {})
    models = build(student, **overrides, **recompute if layers else {}), build(teacher, **overrides)
    settings = DistillSettings(kind=stage_kind(step.stage), train=step.train, loss=step_loss(step),
                               recurrence_block=step.recurrence_block)  # fmt: skip
    model = DistillModel(*models, student, teacher, settings).train()
    model.teacher.eval()
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(drop_gradient)
    return model


def batch(length: int = STEP_LENGTH) -> dict[str, torch.Tensor]:
    names = ("tokens", "position_ids", "labels", "loss_mask", "answer_weight")
    kinds = [torch.long] * 3 + [torch.float] * 2
    return {name: torch.ones(ROWS, length, dtype=kind) for name, kind in zip(names, kinds, strict=True)}


def alive_in(model) -> Alive:
    return Alive([*model.student.parameters(), *model.teacher.parameters()])


def count_step(step: Step) -> int:
    start(cp=step.cp)
    model, tensors = distill_model(step), batch(STEP_LENGTH // step.cp).values()
    with alive_in(model) as alive:
        model(*tensors)[0].backward()
    return alive.most


def count_pipeline(stage: str, rank: int, micro_batches: int) -> int:
    """Of one rank, with the schedules that training takes; what other ranks would send is whatever is there."""
    from megatron.core.pipeline_parallel import get_forward_backward_func

    from hylo_megatron.parallel import teacher_fed

    start(pp=PP, rank=rank)
    model = distill_model(Step("", "gdn", stage, "all"), pre_process=rank == 0, post_process=rank == PP - 1)
    tensors, tokens = batch(), torch.ones((), dtype=torch.int)

    def learn(batch, model, states=None):
        return model(*batch.values(), states), lambda output: (output[0].clone(), tokens, {})

    teacher_fed.learn, teacher_fed.next_batch = learn, lambda *_: tensors
    common = dict(model=model, data_iterator=itertools.repeat(tensors), num_microbatches=micro_batches)
    with alive_in(model) as alive:
        if stage == "ild":
            teacher_fed.TeacherFed()(**common)
        else:
            get_forward_backward_func(PP)(
                forward_step_func=lambda data, model: learn(next(data), model), seq_length=STEP_LENGTH,
                micro_batch_size=ROWS, forward_only=False, **common,
            )  # fmt: skip
    return alive.most


def main() -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    from hylo_megatron.engine.register import install
    from hylo_megatron.layers.load import start_process_groups

    install("megatron")
    start()
    start_process_groups()  # seeds
    pretend_gpu()
    with FakeTensorMode(allow_non_fake_inputs=True):
        halves, steps = count_halves(), [count_step(step) for step in STEPS]
        pipelines = [count_pipeline(*case) for case in PIPELINES]
    print(json.dumps({"halves": halves, "steps": steps, "pipelines": pipelines}))


if __name__ == "__main__":
    main()
