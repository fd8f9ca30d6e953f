"""Packed data sets that stages mix, made from the training text."""

from pathlib import Path

from hylo_megatron.data.pack import pack
from hylo_megatron.recipes.stage import Recipe, Stage
from hylo_megatron.retrieval.make import make_retrieval

# "text": documents joined and cut; "long": windows of long documents; "sampled": documents that the teacher wrote,
# joined and cut; the others: questions about such text with answers
NAMES = ("text", "long", "sampled", "chat", "retrieval")
ON_POLICY = "on-policy"  # documents that the student wrote before the stage, joined and cut (run/on_policy.py)
_PLAIN = ("text", "long", "sampled")  # kinds of text that on-policy documents replace


def with_share(mix: tuple[tuple[str, float], ...], share: float, kind: str, plain: tuple[str, ...]) -> tuple:
    """Return ``mix`` with ``share`` of the kinds in ``plain`` replaced by ``kind``. An empty mix is text alone."""
    mix = mix or (("text", 1.0),)
    replaced = share * sum(part for name, part in mix if name in plain)
    kept = [(name, part * (1 - share) if name in plain else part) for name, part in mix]
    return (*((name, part) for name, part in kept if part), (kind, replaced))


def mix_of(stage: Stage) -> tuple[tuple[str, float], ...]:
    """Return the stage's mix with the share that the student writes itself."""
    return with_share(stage.mix, stage.on_policy, ON_POLICY, _PLAIN) if stage.on_policy else stage.mix


def prefix(folder: Path, name: str, stage: Stage) -> Path:
    return folder / f"{name}-{stage.name if name == ON_POLICY else stage.seq_length}"


def data_path(folder: Path, stage: Stage, tokens: tuple[Path, ...] = ()) -> list[str]:
    """Return a stage's ``--data-path``: weights and prefixes, or only the training text."""
    mix = mix_of(stage)
    if not mix:
        return [str(path) for path in tokens or (folder / "train",)]
    return [part for name, share in mix for part in (str(share), str(prefix(folder, name, stage)))]


def make_datasets(recipe: Recipe, folder: Path, tokenizer: Path) -> None:
    """Make each data set that ``recipe``'s stages mix and that is missing, from ``folder/train`` or ``/sampled``.

    The students' own texts are made later, because no student exists yet.
    """
    wanted: dict[tuple[str, int], int] = {}
    for stage in recipe.stages:
        for name, share in (part for part in mix_of(stage) if part[0] != ON_POLICY):
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
