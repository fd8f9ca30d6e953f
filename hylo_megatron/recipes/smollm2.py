"""SmolLM2-135M-Instruct, upcycled from end to end: ``bash examples/upcycle_smollm2.sh`` (``make demo``)."""

import argparse
import os
from dataclasses import replace
from pathlib import Path

from hylo_megatron.errors import command_line
from hylo_megatron.recipes.runner import Run
from hylo_megatron.recipes.stage import Recipe, Stage


def smollm2_cpu(plan: str = "3MLA27GDN", linear: str = "gdn") -> Recipe:
    """Two CPU cores, under twenty minutes: every stage short, each long enough to be seen to work."""
    # Batches of 512 tokens are noisy: a small step that anneals to nothing, or Adam undoes a good initialisation.
    ild = Stage("ild", "ild", seq_length=512, global_batch=1, steps=60, lr=2e-4, warmup=0.1, train="mixers")
    distill = replace(ild, name="distill", kind="distill", steps=50, lr=3e-5)
    return Recipe(
        "smollm2-cpu", plan, linear, (ild, distill), calibration_tokens=8192, calibration_length=1024,
        eval_context=512, eval_tokens=4000, needle_lengths=(512,), needle_samples=1, needle_depths=4,
    )  # fmt: skip


@command_line
def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add("--plan", default="3MLA27GDN", help="a name such as 3MLA27GDN, or layer numbers with --linear")
    add("--linear", default="gdn", choices=("gdn", "mamba2"))
    add("--tp", type=int, default=1, help="tensor-parallel ranks (SmolLM2 has 9 heads: 1 or 3)")
    add("--pp", type=int, default=1, help="pipeline stages")
    add("--out", help="folder of the run (default: runs/smollm2-PLAN)")
    options = parser.parse_args(argv)
    recipe = smollm2_cpu(options.plan, options.linear)
    out = Path(options.out or os.path.join("runs", f"smollm2-{options.plan.replace(',', '_').replace(':', '')}"))
    Run(recipe, out, options.tp, options.pp).execute()


if __name__ == "__main__":
    main()
