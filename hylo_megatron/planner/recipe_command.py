"""``hylo plan --recipe``: layouts of a published recipe on given GPUs, from shapes alone."""

import argparse

from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import names_of, positive, size, tokens
from hylo_megatron.markdown import table
from hylo_megatron.planner.layouts import CHOSEN, GIB, USABLE, LayoutPlan, Training, disk_bytes, layouts, scaled
from hylo_megatron.planner.speed import CARDS, FITTED, card_named
from hylo_megatron.recipes.shapes import BASE_OF, RECIPES, SHAPES, recipe_named, shape, student_shape

SHOWN = 8


def add_recipe_flags(parser: argparse.ArgumentParser) -> frozenset[str]:
    """Add the flags, and return their names in parsed arguments."""
    group = parser.add_argument_group("a whole recipe", "in place of FOLDER")
    add = group.add_argument
    add("--recipe", choices=RECIPES, help="list layouts that fit, with memory, speed, days and disk;"
        " smollm2-window is the default of hylo recipe on GPUs, smollm2 the one without windows")  # fmt: skip
    add("--gpus", type=size, default=1)
    add("--gpu-memory", type=positive, default=80.0, help="memory of a GPU in GiB")
    add("--card", choices=tuple(CARDS), default="H100", help="the card, for the speed")
    add("--teacher-shape", choices=tuple(SHAPES), help="another teacher than the base model in the KL stages")
    add("--base-shape", choices=tuple(SHAPES), help="another base model than the recipe's")
    add("--tokens", type=tokens, help="tokens of the whole run (default: the recipe's)")
    return names_of(group)


def training_of(known: argparse.Namespace) -> Training:
    """Return the training that the flags describe. Raises ``HyLoError``."""
    if known.folder:
        raise HyLoError("--recipe has models and stages of its own: leave out FOLDER")
    if known.tokens and BASE_OF[known.recipe] == "smollm2":
        raise HyLoError("--tokens: the SmolLM2 recipes are planned with their own; leave it out")
    recipe, base = recipe_named(known.recipe, tokens=known.tokens), shape(known.base_shape or BASE_OF[known.recipe])
    if known.base_shape and base != shape(BASE_OF[known.recipe]):
        recipe = scaled(recipe, base)
    teacher = shape(known.teacher_shape) if known.teacher_shape else base
    if teacher.vocab_size != base.vocab_size:
        raise HyLoError(f"--teacher-shape {known.teacher_shape}: {teacher.vocab_size} words, the base model has"
                        f" {base.vocab_size}; take a teacher of the same family")  # fmt: skip
    return Training(recipe=recipe, student=student_shape(recipe, base), base=base, teacher=teacher,
                    shared=BASE_OF[known.recipe] == "smollm2")  # fmt: skip


def recomputing(found: list[LayoutPlan]) -> set[str]:
    """Return the names of the stages that declare recomputation, or need it on one of the layouts."""
    plans = (plan for each in found for plan in each.stages)
    return {plan.stage.name for plan in plans if plan.stage.recompute or plan.recompute}


def layout_table(found: list[LayoutPlan]) -> str:
    shown = recomputing(found)
    head, rows = ["TP", "PP", "CP", "DP", "days"], []
    for plan in found[0].stages:
        head += [f"{plan.stage.name} GiB", "tokens/s", *(["recomputed"] if plan.stage.name in shown else [])]
    for each in found:
        cells = []
        for plan in each.stages:
            cells += [f"{plan.memory / GIB:.1f}", f"{plan.speed:,.0f}"]
            more = "*" if plan.exceeds_declared else ""
            cells += [f"{plan.recompute} of {plan.sub_layers}{more}"] if plan.stage.name in shown else []
        sizes = (each.layout.tp, each.layout.pp, each.layout.cp, each.dp)
        rows.append([*map(str, sizes), f"{each.days:.2f}", *cells])
    return table([head, *rows], aligned=True)


def recomputation(training: Training, found: list[LayoutPlan]) -> list[str]:
    """Return how the recomputed sub-layers of the table were chosen."""
    lines = []
    if recomputing(found):
        lines.append(
            "A stage recomputes the sub-layers that it declares: evaluations run beside this recipe's training."
            if training.shared
            else "A stage that declares recomputation recomputes as few of a rank's sub-layers as keep its plan within"
            f" {CHOSEN:.0%} of the memory, and so does the recipe's run on GPUs."
        )
    if any(plan.exceeds_declared for each in found for plan in each.stages):
        lines.append(f"* with recompute={2 * training.student.num_layers} in the stage, which fits only so.")
    return lines


def assumptions(training: Training, found: list[LayoutPlan], known: argparse.Namespace) -> list[str]:
    """Return what the figures rest on."""
    lines = [
        f"{USABLE:.0%} of the memory is planned with; the rest is for CUDA, NCCL and fragments.",
        f"{known.card}: products at {card_named(known.card) / 1e12:.0f} TFLOP/s. Speeds were fitted to steps of 0.1B"
        " and 1B students on one GPU, and of 1B and 3B students on two and four GPUs of one host: TP 2 and DP 2 at"
        " 8K, CP 2 at 64K and 128K, CP 4, and CP 2 with DP 2. PP 2 was measured after that, and 4% faster.",
        f"A GPU gets {FITTED.nvlink / 1e9:.0f} GB/s to others of its host, as these steps waited for each other."
        f" Assumed, not measured: the same among {FITTED.node} GPUs with NVLink, {FITTED.network / 1e9:.0f} GB/s to"
        " other nodes, and the bubbles of longer pipelines. Attention's keys and values arrive behind attention to the"
        " rank's own tokens; a rank waits for everything else. TP with sequence parallelism.",
    ]
    lines += recomputation(training, found)
    if training.recipe.layers != recipe_named(known.recipe).layers:
        lines.append(
            f"{known.base_shape} has no published recipe: the stages are those of {known.recipe}, with the plan"
            f" {training.student.plan.name} and native geometry."
        )
    return lines


def print_layouts(known: argparse.Namespace) -> None:
    training = training_of(known)
    found = layouts(training, known.gpus, known.gpu_memory, card_named(known.card))
    if not found:
        raise HyLoError(
            f"--gpus {known.gpus} --gpu-memory {known.gpu_memory:g}: no layout holds every stage of {known.recipe};"
            " take more GPUs, or larger ones"
        )
    tokens = sum(stage.tokens for stage in training.recipe.stages)
    print(f"{known.recipe}: {training.student.plan.name}, {tokens / 1e9:.2f}B tokens, {known.gpus} x {known.card} of"
          f" {known.gpu_memory:g} GiB; disk {disk_bytes(training) / 1e9:.0f} GB")  # fmt: skip
    print(layout_table(found[:SHOWN]))
    if len(found) > SHOWN:
        print(f"slower layouts that fit: {len(found) - SHOWN}")
    print("\n".join(assumptions(training, found[:SHOWN], known)))
