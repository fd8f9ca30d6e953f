"""The step that tests of ``tools/bench/scaling.py`` measure."""

import argparse

from helpers.paths import ROOT

BENCH = ROOT / "tools" / "bench"
RECIPE = ("--recipe", "llama1b", "--stage", "distill-64k", "--teacher-shape", "llama8b", "--random")


def options_of(scaling, *flags: str, gpus: int = 4, memory: float = 80.0) -> argparse.Namespace:
    options = scaling.parsed([*RECIPE, *flags])
    options.gpus, options.gpu_memory = gpus, memory
    return options
