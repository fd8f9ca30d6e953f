"""What a checkpoint's surroundings say about its training, for the model card. No torch.

A recipe's run has ``recipe.json``, the text's ``SOURCES.md`` and ``eval-STAGE.json`` beside the checkpoint of a stage.
Any training leaves ``train_log.jsonl`` in its checkpoint.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from hylo_megatron.corpus.smollm2 import STAMP
from hylo_megatron.json_file import parse, read_json

SMOLLM2 = ("HuggingFaceTB/SmolLM2-135M-Instruct", "apache-2.0")


@dataclass(frozen=True, kw_only=True)
class TrainedStage:
    """A training. ``length`` is the number of tokens of a sequence, ``mix`` names the data sets with their shares."""

    name: str
    kind: str
    steps: int
    tokens: int
    length: int | None = None
    mix: str = ""


@dataclass(frozen=True, kw_only=True)
class Text:
    """A source of training text. ``licence`` is None if no record has it."""

    name: str
    licence: str | None = None
    package: str = ""


@dataclass(frozen=True, kw_only=True)
class Origin:
    """Where a model comes from. An empty field is unknown.

    ``base_model`` is a name on the Hugging Face Hub, ``licence`` that of the exported weights, by the Hub's names.
    """

    base_model: str | None = None
    licence: str | None = None
    recipe: str | None = None
    init: str | None = None
    stages: tuple[TrainedStage, ...] = ()
    texts: tuple[Text, ...] = ()
    evaluation: Path | None = None


UNKNOWN = Origin()


def origin_of(checkpoint: Path) -> Origin:
    """Return what is known of a Megatron checkpoint. Raises ``HyLoError`` if a record is damaged."""
    run = checkpoint.parent
    found = [checkpoint / "evaluation.json", run / f"eval-{checkpoint.name}.json"]
    origin = Origin(evaluation=next((path for path in found if path.is_file()), None))
    if (run / "recipe.json").is_file():
        recipe = read_json(run / "recipe.json")
        names = [stage["name"] for stage in recipe.get("stages", ())]
        if checkpoint.name in names or checkpoint.name == "student":
            done = names[: names.index(checkpoint.name) + 1] if checkpoint.name in names else []
            return _of_recipe(origin, run, recipe, done)
    log = checkpoint / "train_log.jsonl"
    if log.is_file() and (lines := log.read_bytes().splitlines()):
        last = parse(lines[-1], f"{log}:{len(lines)}")
        stage = TrainedStage(
            name=checkpoint.name, kind=last["stage"], steps=last["iteration"], tokens=last.get("tokens", 0)
        )
        return replace(origin, stages=(stage,))
    return origin


def _of_recipe(origin: Origin, run: Path, recipe: dict, done: list[str]) -> Origin:
    stages = tuple(
        TrainedStage(
            name=stage["name"],
            kind=stage["kind"],
            steps=stage["steps"],
            tokens=stage["steps"] * stage["global_batch"] * stage["seq_length"],
            length=stage["seq_length"],
            mix=", ".join(f"{share:.0%} {name}" for name, share in stage["mix"]),
        )
        for stage in recipe["stages"]
        if stage["name"] in done
    )
    origin = replace(origin, recipe=recipe["name"], init=recipe.get("init"), stages=stages)
    if "base" not in recipe and (run / "hf" / STAMP).is_file():
        origin = replace(origin, base_model=SMOLLM2[0], licence=SMOLLM2[1])
    sources = run / "text" / "SOURCES.md"
    if sources.is_file():
        return replace(origin, texts=tuple(_training_texts(sources)))
    return replace(origin, texts=tuple(Text(name=Path(name).name) for name in recipe.get("data", ())))


def _training_texts(sources: Path) -> list[Text]:
    """Read the rows of training text in the table that ``hylo fetch-text`` writes."""
    rows = [line.strip("|").split("|") for line in sources.read_text(encoding="utf-8").splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows]
    return [Text(name=row[1], package=row[2], licence=row[3]) for row in rows if row[0] == "train.jsonl"]
