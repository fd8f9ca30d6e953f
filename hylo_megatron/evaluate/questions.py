"""Question files: JSON lines of multiple choice, or of questions with the short answers that count as right."""

import random
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from string import ascii_uppercase
from typing import Any, TypeVar

from pydantic import ConfigDict
from typing_extensions import TypedDict

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.encoding import encode_start, question_text
from hylo_megatron.json_file import check, parse

T = TypeVar("T")


class _ChoiceRow(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")
    question: str
    options: list[str]
    answer: int | str


class _AnswersRow(TypedDict):
    __pydantic_config__ = ConfigDict(extra="allow")
    question: str
    answers: list[str]


@dataclass(frozen=True, kw_only=True)
class Choice:
    """A question with its options. ``answer``: index of the right option. ``where``: file and line."""

    question: str
    options: tuple[str, ...]
    answer: int
    where: str = field(compare=False)


@dataclass(frozen=True, kw_only=True)
class Short:
    """A question and every short answer that counts as right. ``where``: file and line."""

    question: str
    answers: tuple[str, ...]
    where: str = field(compare=False)


def read_choices(file: Path) -> tuple[Choice, ...]:
    """Return the multiple-choice questions of a file."""
    return _all(file, _choice)


def read_answers(file: Path) -> tuple[Short, ...]:
    """Return the questions of a file with their short answers."""
    return _all(file, _short)


def draw(questions: tuple[T, ...], shots: int, limit: int | None, seed: int) -> tuple[tuple[T, ...], tuple[T, ...]]:
    """Return ``shots`` examples and the questions to ask, at most ``limit``, drawn from the others in file order."""
    if len(questions) <= shots:
        raise HyLoError(f"{questions[0].where}: {len(questions)} questions, too few for --shots {shots}: give fewer")
    order = random.Random(seed).sample(range(len(questions)), len(questions))
    examples = tuple(questions[index] for index in order[:shots])
    others = [index for index in order[shots:] if questions[index] not in examples]  # a file may repeat a question
    if not others:
        raise HyLoError(f"{questions[0].where}: every question is an example of --shots {shots}: give fewer")
    return examples, tuple(questions[index] for index in sorted(others[:limit]))


def prompt_text(instruction: str, examples: list[tuple[str, str]], question: str) -> str:
    """Return answered examples and a question."""
    answered = (f"Question: {asked}\nAnswer: {answer}" for asked, answer in examples)
    return "\n\n".join([instruction, *answered, f"Question: {question}"])


def prompt_ids(tokenizer, text: str, where: str, room: int) -> tuple[int, ...]:
    """Return the ids of a prompt's text and the start of the answer, at most ``room`` of them."""
    ids = tuple(encode_start(tokenizer, question_text(tokenizer, text, "Answer:")))
    if len(ids) > room:
        raise HyLoError(
            f"{where}: the prompt has {len(ids):,} tokens, expected at most {room:,}: raise --context or lower --shots"
        )
    return ids


def check_prompts(tokenizer, texts: Iterable[tuple[str, str]], room: int) -> None:
    """Refuse prompts of more than ``room`` tokens. ``texts``: each prompt's text, with file and line of its question.

    A token has a byte or more, so a text of few bytes is not tokenised.
    """
    spare = room - len(encode_start(tokenizer, question_text(tokenizer, "", "Answer:")))
    for text, where in texts:
        if len(text.encode()) > spare:
            prompt_ids(tokenizer, text, where, room)


def _all(file: Path, read: Callable[[Any, str], T]) -> tuple[T, ...]:
    """Return the questions of a file. Raises ``HyLoError``."""
    found = tuple(read(value, where) for value, where in _rows(Path(file)))
    if not found:
        raise HyLoError(f"{file} has no questions: expected JSON lines")
    return found


def _rows(file: Path) -> Iterator[tuple[Any, str]]:
    if not file.is_file():
        raise HyLoError(f"{file}: no such file: expected JSON lines of questions")
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            yield parse(line, f"{file}:{number}", "expected one question in JSON on each line"), f"{file}:{number}"


def _choice(value: Any, where: str) -> Choice:
    row = check(value, _ChoiceRow, where, 'expected {"question", "options", "answer"}')
    options = tuple(option.strip() for option in row["options"])
    if not 2 <= len(options) <= len(ascii_uppercase) or "" in options or len(set(options)) < len(options):
        raise HyLoError(f"{where}: field options is {list(options)!r:.80}: expected 2 to 26 different texts")
    answer = row["answer"].strip() if isinstance(row["answer"], str) else row["answer"]
    index = options.index(answer) if answer in options else answer
    if not isinstance(index, int) or not 0 <= index < len(options):
        raise HyLoError(
            f"{where}: field answer is {row['answer']!r:.80}: expected one of the options, or its number from 0"
        )
    return Choice(question=_text(row["question"], where), options=options, answer=index, where=where)


def _short(value: Any, where: str) -> Short:
    row = check(value, _AnswersRow, where, 'expected {"question", "answers"}')
    if not row["answers"] or not all(map(str.strip, row["answers"])):
        raise HyLoError(f"{where}: field answers is {row['answers']!r:.80}: expected one text or more")
    return Short(question=_text(row["question"], where), answers=tuple(row["answers"]), where=where)


def _text(question: str, where: str) -> str:
    if not question.strip():
        raise HyLoError(f"{where}: field question is empty: expected a text")
    return question.strip()
