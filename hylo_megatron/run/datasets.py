"""The packed datasets that stages mix: what each name stands for, and how it is made from the training text."""

from pathlib import Path

from hylo_megatron.data.pack import pack
from hylo_megatron.recipes.stage import Recipe, Stage
from hylo_megatron.retrieval.make import make_retrieval

# "text": documents joined and cut; "long": windows of long documents; the others answer questions about such text
NAMES = ("text", "long", "chat", "retrieval")


def prefix(folder: Path, name: str, stage: Stage) -> Path:
    return folder / f"{name}-{stage.seq_length}"


def data_path(folder: Path, stage: Stage, tokens: tuple[Path, ...] = ()) -> list[str]:
    """``--data-path`` of a stage: weights and prefixes, or the training text alone."""
    if not stage.mix:
        return [str(path) for path in tokens or (folder / "train",)]
    return [part for name, share in stage.mix for part in (str(share), str(prefix(folder, name, stage)))]


def make_datasets(recipe: Recipe, folder: Path, tokenizer: Path) -> None:
    """Whatever ``recipe``'s stages mix and is not there yet, out of ``folder/train``."""
    wanted: dict[tuple[str, int], int] = {}
    for stage in recipe.stages:
        for name, share in stage.mix:
            key = (name, stage.seq_length)
            wanted[key] = wanted.get(key, 0) + stage.samples(share)
    for (name, length), samples in wanted.items():
        out, source = folder / f"{name}-{length}", folder / "train"
        if out.with_suffix(".json").is_file():
            continue
        if name in ("text", "long"):
            pack(source, out, length + 1, long_documents=name == "long")
        else:
            make_retrieval(
                source, tokenizer, out, length + 1, samples, recipe.seed, chat_share=float(name == "chat")
            )  # one worker: samples take seconds, and so does the start of a process
