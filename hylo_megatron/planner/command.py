"""Memory that serving or training a model takes, and what fits on a GPU. No weights are loaded.

    hylo plan FOLDER [--gpu-gib 141] [--tp 1]              an exported or a base model's folder
    hylo plan FOLDER --plan 6MLA22GDN --geometry native    the hybrid that a base model would become
    hylo plan FOLDER --plan 6MLA22GDN --train distill --tp 2 --cp 2 --dp 4 --sequence 32768
    hylo plan --recipe llama3b --gpus 8 --gpu-memory 80 --teacher-shape llama8b    layouts of a whole recipe

Serving is planned beside the base Transformer, with bytes as vLLM lays them out: all layers have pages of one size,
and a recurrent state takes a page (docs/serving.md compares with vLLM's log). Training is the peak of torch's
allocator on a rank in bf16 with the kernels of a GPU (docs/gpu.md compares); CUDA's context and NCCL's buffers, some
tenths of a GiB, come on top.
"""

import argparse
import sys
from dataclasses import replace
from pathlib import Path

from hylo_megatron.config import Architecture, Plan, geometry_preset
from hylo_megatron.config.geometry import GEOMETRY_HELP, check_heads
from hylo_megatron.config.layout import ParallelLayout, Work, check_parallel_layout, shared_heads
from hylo_megatron.config.positions import add_window, changed, given
from hylo_megatron.config.shapes import element_count
from hylo_megatron.config.stages import STAGE_KINDS, TRAIN, stage_kind
from hylo_megatron.convert.hf_config import read_architecture
from hylo_megatron.convert.pair import check_teacher, check_vocabularies
from hylo_megatron.distill.losses import LOSSES, check_levers, loss_of
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line, count, flag_among, names_of, positive, share, size, weight
from hylo_megatron.flags import given as given_flags
from hylo_megatron.mixers.window import cached_values
from hylo_megatron.planner.pages import Pages, expanded_bytes, pages, row_bytes, state_bytes
from hylo_megatron.planner.recipe_command import add_recipe_flags, print_layouts
from hylo_megatron.planner.training import Peak, PlannedRun, peaks
from hylo_megatron.serve.refused import served as served_by_vllm

LENGTHS = (2048, 32768, 1 << 20)
GIB = 1 << 30
VOCABULARY = 64  # vLLM pads the vocabulary to multiples of this before ranks share it
ACTIVATIONS = GIB  # what vLLM's profile run of 16K tokens left of a 3B model


def read(folder: Path) -> Architecture:
    path = folder / "config.json"
    if not path.exists():
        raise HyLoError(f"{path} is missing: give the folder of an exported model or of its base model")
    return read_architecture(folder)


def weight_bytes(arch: Architecture, tp: int) -> int:
    """Return bytes in bf16. The tensors that tensor parallelism does not cut are small beside the rest."""
    return 2 * element_count(arch) // tp


def undivided(arch: Architecture, tp: int) -> str | None:
    """Return why vLLM cannot share a model among ``tp`` ranks, or None. vLLM repeats key heads that are too few."""
    for what, heads, _, _ in shared_heads(arch, ParallelLayout(tp=tp)):
        repeated = what == "key-value heads" and tp % heads == 0
        if heads % tp and not repeated:
            fits = [each for each in range(1, heads + 1) if heads % each == 0]
            return f"--tp {tp} does not divide {heads} {what} (sizes that do: {fits})"
    vocabulary = VOCABULARY * -(-arch.vocab_size // VOCABULARY)
    for what, total in (("MLP features", arch.intermediate_size), ("rows of the padded vocabulary", vocabulary)):
        if total % tp:
            return f"--tp {tp} does not divide {total} {what}; take a size that does"
    return None


def key_value_bytes(base: Architecture, tp: int) -> int:
    """Return bytes of a token of a base model on one rank. Ranks beyond its key heads have copies of them."""
    return base.kv_bytes_per_token() // min(tp, base.num_key_value_heads)


def rows(arch: Architecture, known) -> list[tuple[str, str]]:
    budget = int(known.gpu_gib * GIB * known.utilization) - weight_bytes(arch, known.tp) - ACTIVATIONS
    heads, found = arch.num_attention_heads, [("weights", f"{weight_bytes(arch, known.tp) / GIB:.2f} GiB")]
    if arch.is_hybrid:
        served = served_by_vllm(arch, on_gpu=True)
        found += [("as served", note) for note in served.notes]
        itemsize = 4 if known.state_dtype == "float32" else 2
        sizes = dict(state_itemsize=itemsize, tp=known.tp, window=cached_values(arch, known.tp))
        layout = pages(served, arch.plan, heads, **sizes)
        row = row_bytes(served, heads, tp=known.tp) * layout.layers[0]
        states = state_bytes(served, arch.linear_kind, **sizes) * layout.layers[1]
        found.append(("states of a request", f"{states / 2**20:.1f} MiB"))
        if layout.layers[0] and not served.expanded:  # to write out latents
            space = max(known.requests * layout.block, 64 * 1024) * expanded_bytes(served, heads, tp=known.tp)
            found.append(("work space", f"{space / GIB:.2f} GiB for {known.requests} requests at once"))
            budget -= space
    else:
        row = key_value_bytes(arch, known.tp)
        layout = Pages(16, 16 * row // arch.num_layers, (arch.num_layers, 0))
    if arch.window:
        windows = 2 * sizes["window"] * layout.layers[1]
        tokens = windows / key_value_bytes(arch.as_teacher(), known.tp)
        text = f"{windows / 2**20:.1f} MiB of its states, as {tokens:,.0f} tokens of the base model"
        found.append(("windows of a request", text))
    found += [("cache of a token", f"{row:,} bytes"), ("block", f"{layout.block:,} tokens"),
              ("left for caches", f"{budget / GIB:.1f} GiB")]  # fmt: skip
    for length in LENGTHS:
        requests = layout.requests(max(0, budget), length)
        each = f"{budget / (requests * length):,.0f} bytes a token with its pages" if requests else "none fits"
        found.append((f"requests of {length:,}", f"{requests:,} ({requests * length:,} tokens; {each})"))
    return found


def training(student: Architecture, known) -> PlannedRun:
    """Return the run that the flags describe. Raises ``HyLoError``, as the trainer, where it would not start."""
    kind = stage_kind(known.train)
    if not student.is_hybrid:
        raise HyLoError(f"{known.folder} holds a Transformer: say with --plan what it becomes")
    if known.recompute and known.recompute_chunk:
        raise HyLoError("--recompute and --recompute-chunk are two methods of recompute; choose one")
    if kind.layerwise and (known.recompute or known.recompute_chunk):
        raise HyLoError(f"--recompute: {kind.name} trains each layer apart and recomputes none; leave it out")
    teacher = read(known.teacher) if known.teacher else replace(student.as_teacher(), mla_qk_norm=False)
    check_teacher(student, teacher, kind, prefix="--", stage="--train")
    check_vocabularies(student, teacher, (known.folder, known.teacher or known.folder))
    layout = ParallelLayout(tp=known.tp, pp=known.pp, cp=known.cp, linear_cp=known.linear_cp,
                            sequence_parallel=known.sequence_parallel and known.tp > 1)  # fmt: skip
    batch = known.global_batch or known.micro_batch * known.dp * known.pp  # enough to fill the pipeline
    work = Work(
        processes=layout.ranks * known.dp, seq_length=known.sequence, micro_batch=known.micro_batch, global_batch=batch
    )
    check_parallel_layout({"student": student, "teacher": teacher}, layout, work)
    check_levers(kind, known, prefix="--", stage="--train")
    loss = loss_of(kind, known)
    loss.check(student, teacher, known.pp, bool(known.recompute or known.recompute_chunk), "--")
    return PlannedRun(student=student, teacher=teacher, kind=kind, loss=loss, layout=layout, work=work,
                      train=known.hylo_train or kind.train, recompute=known.recompute,
                      recompute_chunk=known.recompute_chunk, mlp_block=known.mlp_block,
                      recurrence_block=known.recurrence_block,
                      teacher_fp8=known.teacher_fp8, offload_teacher=known.offload_teacher,
                      offload_optimizer=known.offload_optimizer)  # fmt: skip


def parts(found: Peak) -> list[tuple[str, int]]:
    """Return the parts of a peak; of loss and backward pass only the larger one counts."""
    last = ("loss", found.loss) if found.loss >= found.backward else ("backward pass", found.backward)
    return [
        ("student parameters", found.student.parameters), ("teacher parameters", found.teacher),
        ("gradients", found.student.gradients), ("optimizer", found.student.optimizer),
        ("activations", found.activations), ("teacher's states", found.teacher_states), last,
        ("work spaces", found.workspaces), ("total", found.total),
    ]  # fmt: skip


def print_training(run: PlannedRun, gpu_gib: float) -> None:
    found, work, layout = peaks(run), run.work, run.layout
    print(f"{run.kind.name} of {run.student.plan.name}, {layout} DP {work.processes // layout.ranks}:"
          f" {run.micro_batches} micro-batches of {work.micro_batch} x {work.seq_length:,} tokens a step")  # fmt: skip
    for index, each in enumerate(found if len(found) > 1 else ()):
        where = f"stage {index}, layers {each.layers.start}-{each.layers.stop - 1}"
        print(f"  {where:24} {each.total / GIB:.2f} GiB")
    heaviest = max(found, key=lambda each: each.total)
    print(f"a rank of stage {found.index(heaviest)}" if len(found) > 1 else "each rank")
    for what, amount in parts(heaviest):
        print(f"  {what:24} {amount / GIB:.2f} GiB")
    verdict = "fits" if heaviest.total <= gpu_gib * GIB else "does not fit"
    print(f"{verdict} {gpu_gib:g} GiB ({heaviest.total / GIB / gpu_gib:.0%})")


def add_serving_flags(parser: argparse.ArgumentParser) -> frozenset[str]:
    """Add the flags, and return their names in parsed arguments."""
    group = parser.add_argument_group("serving")
    group.add_argument("--utilization", type=share, default=0.9, help="vLLM's --gpu-memory-utilization")
    group.add_argument("--requests", type=size, default=64, help="vLLM's --max-num-seqs")
    group.add_argument("--state-dtype", choices=("float32", "bfloat16"), default="float32")
    return names_of(group)


def add_training_flags(parser: argparse.ArgumentParser) -> frozenset[str]:
    """Add the flags, and return their names in parsed arguments."""
    group = parser.add_argument_group("training", "as the flags of hylo_megatron.train")
    add = group.add_argument
    add("--train", choices=tuple(STAGE_KINDS), help="plan this stage of training, not serving")
    add("--teacher", type=Path, help="folder of another teacher than the base model (distill)")
    for flag in ("--pp", "--cp", "--dp", "--micro-batch"):
        add(flag, type=size, default=1)
    add("--sequence", type=size, default=2048, help="--seq-length")
    add("--global-batch", type=size, help="(default: a micro-batch for each pipeline stage)")
    add("--sequence-parallel", action="store_true")
    add("--linear-cp", choices=("auto", "a2a", "states"), default="auto", help="--hylo-linear-cp")
    add("--hylo-train", choices=TRAIN, help="(default: mixers for ild, all for distill)")
    recompute = "--recompute-num-layers of method block: recomputed sub-layers (mixers or MLPs) of a stage"
    add("--recompute", type=count, default=0, help=recompute)
    chunk = "--recompute-num-layers of method uniform: sub-layers that are recomputed together, of all"
    add("--recompute-chunk", type=size, default=0, help=chunk)
    add("--mlp-block", type=size, help="--hylo-mlp-block (default: automatic)")
    add("--recurrence-block", type=size, help="--hylo-recurrence-block (default: all)")
    add("--teacher-fp8", action="store_true", help="--hylo-teacher-fp8")
    add("--offload-teacher", action="store_true", help="--hylo-offload-teacher")
    add("--offload-optimizer", action="store_true", help="--hylo-offload-optimizer")
    # The losses read these under the names of the trainer's flags.
    add("--loss", dest="hylo_loss", choices=tuple(LOSSES), help="--hylo-loss")
    add("--kl-chunk", dest="hylo_kl_chunk", type=size, default=4096, help="--hylo-kl-chunk (default: the recipes')")
    for flag in ("hidden-weight", "hidden-layers-weight"):
        name = f"hylo_{flag.replace('-', '_')}"
        add(f"--{flag}", dest=name, type=weight, default=0.0, help=f"--hylo-{flag}")
    add("--teacher-length", dest="hylo_teacher_length", type=size, help="--hylo-teacher-length")
    return names_of(group)


def parse() -> argparse.Namespace:
    """Return the flags, with ``given``. Raises ``HyLoError`` for flags that the kind of plan does not read."""
    parser = Parser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("--plan", help="layers of the hybrid that a base model would become, such as 6MLA22GDN")
    parser.add_argument("--geometry", default="native", metavar="PRESET[:RANK+ROPE]", help=GEOMETRY_HELP)
    add_window(parser.add_argument)
    parser.add_argument("--gpu-gib", type=positive, default=139.8, help="memory of the GPU (default: an H200's)")
    parser.add_argument("--tp", type=size, default=1)
    serving, training, recipe = (add(parser) for add in (add_serving_flags, add_training_flags, add_recipe_flags))
    known = parser.parse_args()
    known.given = given_flags(parser, sys.argv[1:])
    if known.recipe:
        unread = [(known.given - recipe, "--recipe has models, stages and layouts of its own: leave out {}")]
    else:
        unread = [
            (recipe, "{} is for --recipe: leave it out, or give --recipe in place of FOLDER"),
            (serving if known.train else (), "{} is for a plan of serving: leave it out, or leave out --train"),
            (() if known.train else training, "{} is for a plan of training: leave it out, or give --train"),
            (() if known.plan is not None else ("geometry",), "{} is for the hybrid that --plan names: leave it out"),
        ]
    for names, message in unread:
        if flag := flag_among(parser, known.given & set(names)):
            raise HyLoError(message.format(flag))
    return known


@command_line
def main() -> None:
    known = parse()
    if known.recipe:
        print_layouts(known)
        return
    if not known.folder:
        raise HyLoError("give FOLDER, an exported or a base model's folder, or --recipe")
    arch = read(known.folder)
    if known.plan is not None:
        if arch.is_hybrid:
            raise HyLoError(
                f"--plan {known.plan}: is for a base model, and {known.folder} holds a hybrid; leave it out"
            )
        geometry = geometry_preset(known.geometry, arch.hidden_size, arch.num_attention_heads, arch.head_dim)
        plan = Plan.parse(arch.num_layers, known.plan, geometry=known.geometry, asked="--plan")
        check_heads(arch.head_dim, geometry, set(plan))
        arch = changed(replace(arch, plan=plan, geometry=geometry), given(known), "--plan")
    elif known.window:
        raise HyLoError("--window is for the hybrid that --plan names; this folder's own is counted without it")
    if known.train:
        print_training(training(arch, known), known.gpu_gib)
        return
    models = {"hybrid": arch, "base": arch.as_teacher()} if arch.is_hybrid else {"base": arch}
    if reason := undivided(arch, known.tp):
        raise HyLoError(reason)
    planned = {name: rows(model, known) for name, model in models.items() if not undivided(model, known.tp)}
    for name, model in models.items():
        print(f"{name}: {model.num_layers} layers, {model.plan.count('mla')} of them MLA")
        for what, value in planned.get(name, [("not planned", undivided(model, known.tp))]):
            print(f"  {what:24} {value}")
