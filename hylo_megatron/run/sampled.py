"""Text that the teacher writes, as a kind of text in a recipe's mix."""

import gc
from dataclasses import replace
from pathlib import Path

import torch

from hylo_megatron.data import prepare
from hylo_megatron.errors import HyLoError
from hylo_megatron.recipes.stage import Recipe
from hylo_megatron.run.datasets import mix_of, with_share
from hylo_megatron.sample import command

KIND = "sampled"
PLAIN = ("text", "long")  # the kinds that sampled text replaces


def with_sampled(recipe: Recipe, share: float) -> Recipe:
    """Return ``recipe`` with ``share`` of each stage's plain text (kinds text and long) sampled from the teacher."""
    if not share:
        return recipe
    stages = [replace(stage, mix=with_share(stage.mix, share, KIND, PLAIN)) for stage in recipe.stages]
    return replace(recipe, stages=tuple(stages))


def sampled_tokens(recipe: Recipe) -> int:
    """Return how many tokens of sampled text the stages read together; 0 if none mixes any."""
    shares = [(stage, share) for stage in recipe.stages for name, share in mix_of(stage) if name == KIND and share]
    return sum(stage.samples(share) * (stage.seq_length + 1) for stage, share in shares)


def write_sampled(recipe: Recipe, teacher: Path, out: Path, tokens: Path, tokenizer: Path, more: tuple = ()) -> None:
    """Sample the text into folder ``out``, and write its documents as token files with the prefix ``tokens``.

    ``more``: flags of ``hylo sample-text`` beside those that the recipe decides.
    """
    wanted = sampled_tokens(recipe)
    write_documents(teacher, out, tokens, tokenizer, tokens=wanted, seed=recipe.seed, more=more)


def write_documents(
    model: Path, out: Path, prefix: Path, tokenizer: Path, *, tokens: int, seed: int, more: tuple = ()
) -> None:
    """Sample ``tokens`` tokens from ``model`` into folder ``out``, and write them as token files with ``prefix``."""
    flags = {"--teacher": model, "--out": out, "--tokens": tokens, "--seed": seed}
    options = command.parser().parse_args([str(part) for pair in flags.items() for part in pair] + [*more])
    command.sample(options)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()  # the rows' cache took most of the GPU
    inputs = sorted(out.glob("sampled-*.jsonl"))
    if not inputs:
        raise HyLoError(f"{out}: no sampled text: remove the folder and run again")
    prepare.prepare(inputs, tokenizer, prefix)
