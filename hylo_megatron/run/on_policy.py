"""Text that the student writes itself before a stage, as a part of this stage's plain text.

The student of the stage's start writes the text, and the stage does not refresh it. The teacher's logits on the text
are the training signal, as for any other text.
"""

from dataclasses import replace
from pathlib import Path

from hylo_megatron.config.stages import stage_kind
from hylo_megatron.data.pack import pack
from hylo_megatron.errors import HyLoError
from hylo_megatron.recipes.stage import Recipe, Stage
from hylo_megatron.run.datasets import ON_POLICY, mix_of, prefix
from hylo_megatron.run.sampled import write_documents

LONGEST_ROW = 1024  # tokens, as by default in hylo sample-text
FEWEST_ROWS = 32  # of a shard: fewer rows do not show how many of a student's rows are dropped


def with_on_policy(recipe: Recipe, share: float) -> Recipe:
    """Return ``recipe`` with ``share`` of the plain text of each distillation stage written by the student."""
    layerwise = [stage_kind(stage.kind).layerwise for stage in recipe.stages]
    stages = zip(recipe.stages, layerwise, strict=True)
    return replace(recipe, stages=tuple(s if apart else replace(s, on_policy=share) for s, apart in stages))


def check(recipe: Recipe, data: Path, tokens: tuple[Path, ...]) -> None:
    """Raise ``HyLoError`` if a stage's ``on_policy`` cannot be followed. ``tokens``: prefixes of the training text."""
    for stage in recipe.stages:
        if stage.on_policy == 0:
            continue
        label = f"stage {stage.name}: on_policy {stage.on_policy}"
        if not 0 < stage.on_policy <= 1:
            raise HyLoError(f"{label}: expected a share from 0 to 1")
        if stage_kind(stage.kind).layerwise:
            raise HyLoError(f"{label}: a stage of kind {stage.kind} reads the teacher's states, use it in distill")
        if not dict(mix_of(stage)).get(ON_POLICY):
            raise HyLoError(f"{label}: its mix has no plain text to replace, expected text, long or sampled")
        if tokens != (data / "train",):
            raise HyLoError(f"{label}: needs the training text as text files, found token files ({tokens[0]})")


def on_policy_tokens(stage: Stage) -> int:
    """Return how many tokens of its own text the stage reads; 0 if none."""
    share = dict(mix_of(stage)).get(ON_POLICY, 0)
    return stage.samples(share) * (stage.seq_length + 1) if share else 0


def packed(data: Path, stage: Stage) -> Path:
    """Return the file that is written last, when the stage's own text is complete."""
    return prefix(data, ON_POLICY, stage).with_suffix(".json")


def write_on_policy(
    stage: Stage, student: Path, out: Path, data: Path, *, tokenizer: Path, seed: int, more: tuple = ()
) -> None:
    """Sample the stage's own text from the folder ``student`` into folder ``out``, and pack it in ``data``.

    ``more``: flags of ``hylo sample-text`` beside those that the recipe decides.
    """
    documents, tokens = data / f"{ON_POLICY}-{stage.name}-documents", on_policy_tokens(stage)
    length = min(LONGEST_ROW, stage.seq_length)
    rows = min(1000, max(FEWEST_ROWS, tokens // length))
    # vLLM would keep the GPU's memory
    flags = ("--engine", "transformers", "--length", str(length), "--rows-per-shard", str(rows), *more)
    write_documents(student, out, documents, tokenizer, tokens=tokens, seed=seed, more=flags)
    pack(documents, prefix(data, ON_POLICY, stage), stage.seq_length + 1)
