"""Files that steps of a run leave for later steps: evaluation reports and training logs."""

from pathlib import Path
from typing import NotRequired

from pydantic import ConfigDict
from typing_extensions import TypedDict

from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import AtLeastZero, Count, Number, Positive, Size, check, parse, read_json

ADVICE = "remove it: the step that writes it runs again then"


class _Record(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")


class Part(_Record):
    loss: AtLeastZero
    perplexity: Positive
    tokens: Size


class NeedleRow(_Record):
    length: Size
    hits: Count
    samples: Size


class NeedleResults(_Record):
    by_length: list[NeedleRow]


class Figures(_Record):
    perplexity: dict[str, Part]
    kv_cache_bytes_per_token: Count
    window_cache_bytes: NotRequired[Count]
    needle: NotRequired[NeedleResults]


class Report(_Record):
    model: Figures
    teacher: NotRequired[Figures]
    versions: dict[str, str]
    device: str


class Sample(_Record):
    prompt: str
    teacher: str
    student: str


class StepLine(_Record):
    iteration: Size
    loss: Number
    seconds: AtLeastZero | None
    memory_gib: AtLeastZero


def read_report(path: Path) -> Report:
    return read_json(path, Report, ADVICE)


def read_sample(path: Path) -> Sample:
    return read_json(path, Sample, ADVICE)


def step_line(text: bytes, where: str) -> StepLine:
    return check(parse(text, where), StepLine, where)


def read_steps(log: Path) -> list[StepLine]:
    """Return all lines of a finished stage's log. Raises ``HyLoError``."""
    lines = log.read_bytes().splitlines() if log.is_file() else []
    if not lines:
        raise HyLoError(
            f"{log}: no steps, expected those of a finished stage; remove the stage's folder to run it again"
        )
    return [step_line(line, f"{log}:{number}") for number, line in enumerate(lines, 1)]
