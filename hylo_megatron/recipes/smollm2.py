"""Upcycle SmolLM2-135M-Instruct from end to end: ``bash examples/upcycle_smollm2.sh`` (``make demo``)."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

import torch

from hylo_megatron.config import Plan
from hylo_megatron.config.geometry import GEOMETRY_HELP, geometry_name
from hylo_megatron.config.layout import ParallelLayout, Work, check_parallel_layout
from hylo_megatron.corpus.text import MIXES
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line, count, share, size, tokens
from hylo_megatron.mixers import LINEAR, MIXERS
from hylo_megatron.recipes.shapes import SHAPES, student_shape
from hylo_megatron.recipes.stage import Evaluation, Recipe, Stage
from hylo_megatron.recipes.window import first_distillation, with_window, without_mla_positions
from hylo_megatron.run.launch import Processes
from hylo_megatron.run.on_policy import with_on_policy
from hylo_megatron.run.recipe_run import Run
from hylo_megatron.run.sampled import with_sampled

TEACHER_LENGTH = 6144  # the teacher supports 8,192 tokens, but is worse near that end
LAYERS = 30
# The layers that read tokens farther back than a window of 256 (docs/experiments.md, C3 and C4).
FAR_LAYERS = "15,17,18,20,23,24"
# the base model's value, with the slowest of 32 frequencies four times slower (NTK)
ROPE_THETA = 100_000 * 4 ** (64 / 62)


def default_plan(linear: str | None, mla: int = 3) -> str:
    """Return the plan with ``mla`` MLA layers; 3 with the native rows have 8.3 % of the base model's KV cache."""
    return f"{mla}MLA{LAYERS - mla}{MIXERS[linear or LINEAR[0]].short}"


def smollm2_cpu(plan: str | None = None, linear: str | None = None, seed: int = 1234) -> Recipe:
    """Return the recipe for two CPU cores: about twenty minutes, each stage just long enough to show an effect."""
    # Batches of 512 tokens are noisy: without a small, decaying learning rate Adam undoes a good initialisation.
    ild = Stage(name="ild", kind="ild", seq_length=512, global_batch=1, steps=60, lr=2e-4, warmup=0.1, train="mixers")
    distill = replace(ild, name="distill", kind="distill", steps=50, lr=3e-5)
    evaluation = Evaluation(context=512, tokens=4000, needle_lengths=(512,), needle_samples=1, needle_depths=4)
    return Recipe(
        name="smollm2-cpu", plan=plan or default_plan(linear), linear=linear, stages=(ild, distill),
        calibration_tokens=8192, calibration_length=1024, evaluation=evaluation, seed=seed,
    )  # fmt: skip


def smollm2_gpu(plan: str | None = None, linear: str | None = None, seed: int = 1234) -> Recipe:
    """Return the recipe for one GPU: 30M tokens, with lengths up to 32K, four times the teacher's context."""
    ild = Stage(
        name="ild", kind="ild", seq_length=2048, global_batch=8, micro_batch=8, steps=300, lr=1.5e-3, min_lr=1.5e-4,
        train="mixers", mix=(("text", 0.78), ("chat", 0.10), ("retrieval", 0.12)),
    )  # fmt: skip
    distill = replace(
        ild, name="distill-2k", kind="distill", steps=960, lr=6e-4, min_lr=5e-5, train="all", answer_weight=0.1,
        copied_lr_mult=0.3, decay_lr_mult=2.0,
    )  # fmt: skip
    longer = replace(
        distill, name="distill-8k", seq_length=8192, global_batch=2, micro_batch=2, steps=280, lr=2e-4, min_lr=6e-5,
        mix=(("text", 0.40), ("long", 0.15), ("chat", 0.05), ("retrieval", 0.40)), rope={"rope_theta": ROPE_THETA},
        teacher_length=TEACHER_LENGTH, ce_weight=0.1,
    )  # fmt: skip
    longest = replace(
        longer, name="distill-32k", seq_length=32768, global_batch=1, micro_batch=1, steps=140, min_lr=0.0,
        mix=(("long", 0.45), ("chat", 0.05), ("retrieval", 0.50)),
        recompute=29,  # of 60 sub-layers, to save memory
    )  # fmt: skip
    evaluation = Evaluation(
        context=2048, tokens=150_000, needle_lengths=(1024, 2048, 4096, 6144, 8192, 16384, 32768), needle_samples=10,
        needle_depths=10, long_context=32768,
    )  # fmt: skip
    return Recipe(
        name="smollm2-gpu", plan=plan or default_plan(linear), linear=linear,
        stages=(ild, distill, longer, longest), calibration_tokens=32768, calibration_length=2048,
        evaluation=evaluation, text="large", save_every=500, seed=seed,
    )  # fmt: skip


def windowed(recipe: Recipe, plan: str | None) -> Recipe:
    """Return ``recipe`` with windows, and MLA in the layers that read far tokens, with rows half as wide."""
    return with_window(replace(recipe, plan=plan or FAR_LAYERS, geometry="native:128+32"))


def smollm2_cpu_window(plan: str | None = None, linear: str | None = None, seed: int = 1234) -> Recipe:
    """Return the recipe for two CPU cores with a window: its student starts near its teacher, where the rates of
    ``smollm2_cpu`` would lead it away.
    """
    recipe = windowed(smollm2_cpu(linear=linear, seed=seed), plan)
    ild, distill = recipe.stages
    return replace(recipe, stages=(replace(ild, lr=4e-5), replace(distill, lr=1e-5)))


def smollm2_gpu_window(plan: str | None = None, linear: str | None = None, seed: int = 1234) -> Recipe:
    """Return the recipe for GPUs with a window: 202M tokens, in batches that one, two or four GPUs share."""
    recipe = without_mla_positions(windowed(smollm2_gpu(linear=linear, seed=seed), plan))
    ild, short, longer, longest = recipe.stages
    stages = (
        replace(ild, global_batch=16),
        replace(short, global_batch=16, steps=5024),
        replace(longer, global_batch=4),
        replace(longest, global_batch=4),
    )
    return replace(recipe, stages=stages, text="prose")


def with_tokens(recipe: Recipe, tokens: int) -> Recipe:
    """Return ``recipe`` with ``tokens`` in all stages, or less by a part of a batch.

    The first distillation stage has what the other stages leave. Raises ``HyLoError`` if they leave nothing.
    """
    first = first_distillation(recipe)
    others = sum(each.tokens for each in recipe.stages if each is not first)
    steps = (tokens - others) // (first.global_batch * first.seq_length)
    if steps < 1:
        raise HyLoError(f"--tokens {tokens:,}: the stages beside {first.name} take {others:,}; give more than these")
    return replace(recipe, stages=tuple(replace(s, steps=steps) if s is first else s for s in recipe.stages))


def with_batches(recipe: Recipe, factor: int) -> Recipe:
    """Return ``recipe`` with ``factor`` times the sequences in each batch, and so of the tokens."""
    stages = tuple(replace(stage, global_batch=factor * stage.global_batch) for stage in recipe.stages)
    return replace(recipe, stages=stages)


RECIPES = {  # by --recipe and whether there is a GPU
    ("base", False): smollm2_cpu, ("base", True): smollm2_gpu,
    ("window", False): smollm2_cpu_window, ("window", True): smollm2_gpu_window,
}  # fmt: skip


def found_recipe(options: argparse.Namespace) -> Recipe:
    """Return the recipe that the command line asks for, for this machine's device."""
    gpu = torch.cuda.is_available()
    kind = RECIPES[options.recipe, gpu]
    plan, linear, geometry = options.plan, options.linear, options.geometry or kind().geometry
    geometry_name(geometry)  # refuses a wrong one
    if plan is not None:
        Plan.parse(LAYERS, plan, linear, geometry, "--plan")  # refuses in the words of the command line
        read = replace(kind(), plan=plan, linear=linear, geometry=geometry)  # reads a plan's file
        plan, linear = read.plan, read.linear
    recipe = replace(kind(plan, linear, options.seed), geometry=geometry)
    recipe = with_batches(recipe, options.batch_factor)
    if options.tokens:
        recipe = with_tokens(recipe, options.tokens)
    if options.text:
        recipe = replace(recipe, text=options.text)
    recipe = with_sampled(recipe, options.sampled_share)
    return with_on_policy(recipe, options.on_policy_share)


def check_layout(recipe: Recipe, processes: Processes) -> None:
    """Refuse, before anything is fetched, a layout that SmolLM2 or its student does not divide by."""
    models = {"student": student_shape(recipe, SHAPES["smollm2"]), "teacher": SHAPES["smollm2"]}
    check_parallel_layout(models, processes.layout, Work(processes=processes.ranks), sizes=("tp", "pp"))


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--recipe", choices=("base", "window"), default="window",
        help="window: with a window beside all layers and what else gained most (docs/recipe.md); base: without"
        " (default: window)")  # fmt: skip
    default = f"(default: {FAR_LAYERS}; 3MLA27GDN for --recipe base)"
    add("--plan", help=f"3MLA27GDN, the MLA layers' numbers, or plan.json of hylo select-layers {default}")
    add("--linear", choices=LINEAR, help=f"mixer of the other layers (default: {LINEAR[0]}, or the plan's name)")
    add("--geometry", metavar="PRESET[:RANK+ROPE]",
        help=f"{GEOMETRY_HELP} (default: native:128+32; native for --recipe base)")  # fmt: skip
    add("--tokens", type=tokens, metavar="N",
        help="training tokens of all stages, such as 100M; the first distillation stage has what the others leave"
        " (default on a GPU: 202M, and 30M for --recipe base)")  # fmt: skip
    add("--text", choices=sorted(MIXES),
        help="mix of hylo fetch-text (default: small on a CPU; prose on a GPU, large for --recipe base)")  # fmt: skip
    add("--batch-factor", type=size, default=1,
        help="times the sequences in each batch, and so the tokens of each stage: for more than four GPUs, and for"
        " more than one with --recipe base")  # fmt: skip
    add("--tp", type=size, default=1, help="tensor-parallel ranks (SmolLM2 has 9 heads: 1 or 3)")
    add("--pp", type=size, default=1, help="pipeline stages; the remaining factor of the GPUs is data parallel")
    add("--seed", type=count, default=1234)
    add("--sampled-share", type=share, default=0.0,
        help="share of the plain text that the teacher writes itself before training (default: none)")  # fmt: skip
    add("--on-policy-share", type=share, default=0.0,
        help="share of the plain text of each distillation stage that the student writes before it (default:"
        " none)")  # fmt: skip
    add("--cuda-graph", action=argparse.BooleanOptionalAction,
        help="run a training step as one CUDA graph (default: on GPUs without --tp and --pp)")  # fmt: skip
    add("--out", help="folder of the run (default: runs/smollm2-PLAN, with -window for that recipe)")
    options = parser.parse_args(argv)
    recipe = found_recipe(options)
    plan = Plan.parse(recipe.layers, recipe.plan, recipe.linear).name
    suffix = "-window" if recipe.window else ""
    out = Path(options.out or os.path.join("runs", f"smollm2-{plan}{suffix}"))
    processes = Processes.found(ParallelLayout(tp=options.tp, pp=options.pp), options.cuda_graph)
    check_layout(recipe, processes)
    Run(recipe, out, processes).execute()


if __name__ == "__main__":
    main()
