"""What a checkpoint's surroundings say about its training, for the model card. No torch.

A recipe's run has ``recipe.json``, the text's ``SOURCES.md`` and ``eval-STAGE.json`` beside the checkpoint of a stage.
Any training leaves ``train_log.jsonl`` in its checkpoint.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import parse, read_json

STAMP = "hylo_source.json"  # what hylo fetch-smollm2 writes beside a model
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


def origin_of(checkpoint: Path, iteration: int | None = None) -> Origin:
    """Return what is known of a Megatron checkpoint. Raises ``HyLoError`` if a record is damaged.

    ``iteration``: the one that is exported, with which the last training ends; None: all that is recorded.
    """
    run = checkpoint.parent
    found = [checkpoint / "evaluation.json", run / f"eval-{checkpoint.name}.json"]
    origin = Origin(evaluation=next((path for path in found if path.is_file()), None))
    if (run / "recipe.json").is_file():
        recipe = read_json(run / "recipe.json")
        names = [stage["name"] for stage in recipe.get("stages", ())]
        if checkpoint.name in names or checkpoint.name == "student":
            done = names[: names.index(checkpoint.name) + 1] if checkpoint.name in names else []
            return _of_recipe(origin, run, recipe, done, iteration)
    log = checkpoint / "train_log.jsonl"
    lines = log.read_bytes().splitlines() if log.is_file() else []
    steps = (parse(lines[number - 1], f"{log}:{number}") for number in range(len(lines), 0, -1))
    if last := next((step for step in steps if iteration is None or step["iteration"] <= iteration), None):
        stage = TrainedStage(
            name=checkpoint.name, kind=last["stage"], steps=last["iteration"], tokens=last.get("tokens", 0)
        )
        return replace(origin, stages=(stage,))
    return origin


def _stage(stage: dict, steps: int) -> TrainedStage:
    return TrainedStage(
        name=stage["name"],
        kind=stage["kind"],
        steps=steps,
        tokens=steps * stage["global_batch"] * stage["seq_length"],
        length=stage["seq_length"],
        mix=", ".join(f"{share:.0%} {name}" for name, share in stage["mix"]) + _own_text(stage),
    )


def _own_text(stage: dict) -> str:
    share = stage.get("on_policy")
    return f"{'; ' if stage['mix'] else ''}{share:.0%} of the plain text by the student" if share else ""


def _of_recipe(origin: Origin, run: Path, recipe: dict, done: list[str], iteration: int | None) -> Origin:
    read = [stage for stage in recipe["stages"] if stage["name"] in done]
    steps = {stage["name"]: stage["steps"] for stage in read}
    if done and iteration is not None:  # a stage that is not finished, or an earlier iteration of one
        steps[done[-1]] = min(steps[done[-1]], iteration)
    stages = tuple(_stage(stage, steps[stage["name"]]) for stage in read)
    origin = replace(origin, recipe=recipe["name"], init=recipe.get("init"), stages=stages)
    if "base" not in recipe and (run / "hf" / STAMP).is_file():
        origin = replace(origin, base_model=SMOLLM2[0], licence=SMOLLM2[1])
    sources = run / "text" / "SOURCES.md"
    if sources.is_file():
        texts = _training_texts(sources)
    else:
        texts = [Text(name=Path(name).name) for name in recipe.get("data", ())]
    sampled = run / "sampled" / "sampled.json"
    if sampled.is_file() and any(name == "sampled" for stage in read for name, _ in stage["mix"]):
        texts.append(_sampled_text(sampled))
    own = [run / "on-policy" / stage["name"] / "sampled.json" for stage in read if stage.get("on_policy")]
    texts += [_sampled_text(path) for path in own if path.is_file()]
    return replace(origin, texts=tuple(texts))


def _sampled_text(path: Path) -> Text:
    """Read what ``hylo sample-text`` says of the text that the teacher wrote."""
    about = read_json(path)
    try:
        return Text(name=f"sampled from {about['settings']['teacher']}", licence=about["licence"])
    except (KeyError, TypeError) as error:
        raise HyLoError(f"{path}: field {error} is missing: not written by hylo sample-text, remove it") from None


def _training_texts(sources: Path) -> list[Text]:
    """Read the rows of training text in the table that ``hylo fetch-text`` writes."""
    rows = [line.strip("|").split("|") for line in sources.read_text(encoding="utf-8").splitlines()]
    rows = [[cell.strip() for cell in row] for row in rows]
    return [Text(name=row[1], package=row[2], licence=row[3]) for row in rows if row[0] == "train.jsonl"]
