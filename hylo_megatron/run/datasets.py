"""Packed data sets that stages mix, made from the training text."""

from pathlib import Path

from hylo_megatron.data.pack import pack
from hylo_megatron.recipes.stage import Recipe, Stage
from hylo_megatron.retrieval.make import make_retrieval

# "text": documents joined and cut; "long": windows of long documents; "sampled": documents that the teacher wrote,
# joined and cut; the others: questions about such text with answers
NAMES = ("text", "long", "sampled", "chat", "retrieval")


def prefix(folder: Path, name: str, stage: Stage) -> Path:
    return folder / f"{name}-{stage.seq_length}"


def data_path(folder: Path, stage: Stage, tokens: tuple[Path, ...] = ()) -> list[str]:
    """Return a stage's ``--data-path``: weights and prefixes, or only the training text."""
    if not stage.mix:
        return [str(path) for path in tokens or (folder / "train",)]
    return [part for name, share in stage.mix for part in (str(share), str(prefix(folder, name, stage)))]


def make_datasets(recipe: Recipe, folder: Path, tokenizer: Path) -> None:
    """Make each data set that ``recipe``'s stages mix and that is missing, from ``folder/train`` or ``/sampled``."""
    wanted: dict[tuple[str, int], int] = {}
    for stage in recipe.stages:
        for name, share in stage.mix:
            key = (name, stage.seq_length)
            wanted[key] = wanted.get(key, 0) + stage.samples(share)
    for (name, length), samples in wanted.items():
        out, source = folder / f"{name}-{length}", folder / ("sampled" if name == "sampled" else "train")
        if out.with_suffix(".json").is_file():
            continue
        if name in ("text", "long", "sampled"):
            pack(source, out, length + 1, long_documents=name == "long")
        else:
            # one worker: samples take seconds, and starting a process takes as long
            make_retrieval(source, tokenizer, out, length=length + 1, samples=samples, seed=recipe.seed,
                           chat_share=float(name == "chat"))  # fmt: skip
