"""Upcycle SmolLM2-135M-Instruct from end to end: ``bash examples/upcycle_smollm2.sh`` (``make demo``)."""

import os
from dataclasses import replace
from pathlib import Path

import torch

from hylo_megatron.config import Plan
from hylo_megatron.config.layout import ParallelLayout
from hylo_megatron.flags import Parser, command_line, count, share, size
from hylo_megatron.mixers import LINEAR, MIXERS
from hylo_megatron.recipes.stage import Evaluation, Recipe, Stage
from hylo_megatron.run.launch import Processes
from hylo_megatron.run.on_policy import with_on_policy
from hylo_megatron.run.recipe_run import Run
from hylo_megatron.run.sampled import with_sampled

TEACHER_LENGTH = 6144  # the teacher supports 8,192 tokens, but is worse near that end
# the base model's value, with the slowest of 32 frequencies four times slower (NTK)
ROPE_THETA = 100_000 * 4 ** (64 / 62)


def default_plan(linear: str | None) -> str:
    """Return the plan with 8.3 % of the base model's KV cache."""
    return f"3MLA27{MIXERS[linear or LINEAR[0]].short}"


def smollm2_cpu(plan: str | None = None, linear: str | None = None, seed: int = 1234) -> Recipe:
    """Return the recipe for two CPU cores: about twenty minutes, with every stage just long enough to show an
    effect.
    """
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


def found_recipe(*choices) -> Recipe:
    """Return the recipe for this machine's device."""
    return (smollm2_gpu if torch.cuda.is_available() else smollm2_cpu)(*choices)


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = Parser(description=__doc__)
    add = parser.add_argument
    plan = "3MLA27GDN, the MLA layers' numbers, or plan.json of hylo select-layers (default: 3 of the 30 layers)"
    add("--plan", help=f"a name such as {plan}")
    add("--linear", choices=LINEAR, help=f"mixer of the other layers (default: {LINEAR[0]}, or the plan's name)")
    add("--tp", type=size, default=1, help="tensor-parallel ranks (SmolLM2 has 9 heads: 1 or 3)")
    add("--pp", type=size, default=1, help="pipeline stages; the remaining factor of the GPUs is data parallel")
    add("--seed", type=count, default=1234)
    add(
        "--sampled-share",
        type=share,
        default=0.0,
        help="share of the plain text that the teacher writes itself before training (default: none)",
    )
    add(
        "--on-policy-share",
        type=share,
        default=0.0,
        help="share of the plain text of each distillation stage that the student writes before it (default: none)",
    )
    add("--no-cuda-graph", action="store_true", help="launch the kernels of a training step one by one")
    add("--out", help="folder of the run (default: runs/smollm2-PLAN)")
    options = parser.parse_args(argv)
    recipe = with_sampled(found_recipe(options.plan, options.linear, options.seed), options.sampled_share)
    recipe = with_on_policy(recipe, options.on_policy_share)
    plan = Plan.parse(recipe.layers, recipe.plan, recipe.linear).name
    out = Path(options.out or os.path.join("runs", f"smollm2-{plan}"))
    layout = ParallelLayout(tp=options.tp, pp=options.pp)
    Run(recipe, out, Processes.found(layout, not options.no_cuda_graph)).execute()


if __name__ == "__main__":
    main()
