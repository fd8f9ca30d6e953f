"""Streams documents out of text, JSON lines and chat files, one line in memory at a time."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from hylo_megatron.errors import HyLoError

FORMATS = ("text", "jsonl", "chat")
BLOCK = 1 << 20  # characters of a plain text file that are tokenized together


class Piece(NamedTuple):
    """Part of a document; ``last`` closes the document. ``size`` in bytes of the file, for the progress display.
    ``answers``: where in ``text`` an assistant speaks, ``(start, end)``, if that was asked for."""

    text: str
    last: bool
    size: int
    answers: tuple[tuple[int, int], ...] = ()


def detect_format(path: Path) -> str:
    """By the first line: a JSON object is chat if it has "messages", else jsonl; everything else is text."""
    if path.suffix.lower() in (".txt", ".text", ".md", ".rst"):
        return "text"
    number, line = next(((number, line) for number, line in _lines(path) if line.strip()), (0, ""))
    if not number:
        raise HyLoError(f"{path}: the file is empty, expected text or JSON lines")
    try:
        value = json.loads(line)
    except ValueError:
        value = None
    if isinstance(value, dict):
        return "chat" if "messages" in value else "jsonl"
    if path.suffix.lower() in (".jsonl", ".json"):
        raise HyLoError(f'{path}:{number}: not a JSON object: expected one on each line, such as {{"text": "..."}}')
    return "text"


def read_documents(
    path: Path, form: str, text_key: str, render: Callable[[list], str] | None, find_answers: bool = False
) -> Iterator[Piece]:
    """Pieces of the documents in ``path``: one a line, or for ``text`` the whole file in blocks.

    ``render`` turns a list of messages into text (chat only). HyLoError names the file and the line.
    """
    if form == "text":
        yield from _text_blocks(path)
        return
    for number, line in _lines(path):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            value = json.loads(line)
        except ValueError as error:
            raise HyLoError(f"{where}: not valid JSON ({error}): expected one object on each line") from error
        if not isinstance(value, dict):
            raise HyLoError(f'{where}: a JSON {type(value).__name__}, expected an object with "{text_key}"')
        text = _chat_text(value, where, render) if form == "chat" else _plain_text(value, where, text_key)
        answers = answer_spans(value["messages"], text, render, where) if find_answers else ()
        yield Piece(text, True, len(line.encode("utf-8")), answers)


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    with open(path, "rb") as file:
        for number, raw in enumerate(file, 1):
            try:
                yield number, raw.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise HyLoError(
                    f"{path}:{number}: byte {error.start + 1} of the line is not UTF-8: convert the file to UTF-8"
                ) from error


def _text_blocks(path: Path) -> Iterator[Piece]:
    """Cuts only between a line that ends in text and one that begins with text: no token spans such a place, since
    byte-level tokenizers join a line's end to blank space after it only."""
    block: list[str] = []
    size = 0
    for _, line in _lines(path):
        if size >= BLOCK and line[:1].strip() and block[-1].strip():
            yield Piece("".join(block), False, size)
            block, size = [], 0
        block.append(line)
        size += len(line)
    yield Piece("".join(block), True, size)


def _plain_text(value: dict, where: str, text_key: str) -> str:
    text = value.get(text_key)
    if not isinstance(text, str):
        keys = ", ".join(map(repr, value)) or "none"
        raise HyLoError(
            f"{where}: expected a string under '{text_key}', the keys are {keys}: name the right one with --text-key"
        )
    return text


def _chat_text(value: dict, where: str, render: Callable[[list], str]) -> str:
    messages = value.get("messages")
    fits = (
        isinstance(messages, list)
        and messages
        and all(
            isinstance(item, dict) and isinstance(item.get("role"), str) and isinstance(item.get("content"), str)
            for item in messages
        )
    )
    if not fits:
        raise HyLoError(f'{where}: expected {{"messages": [{{"role": "user", "content": "..."}}, ...]}} with strings')
    try:
        return render(messages)
    except HyLoError:
        raise
    except Exception as error:  # templates are programs: they raise what they like
        raise HyLoError(f"{where}: the tokenizer's chat template refused these messages ({error})") from error


def answer_spans(messages: list, text: str, render: Callable[[list], str], where: str) -> tuple[tuple[int, int], ...]:
    """Where the assistant's messages stand in ``text``, which is what ``render`` made of ``messages``."""
    marks = [f"mark{number}mark" for number in range(len(messages))]
    rest = render([{**message, "content": mark} for message, mark in zip(messages, marks, strict=True)])
    spans, at, rebuilt = [], 0, ""
    for message, mark in zip(messages, marks, strict=True):
        before, found, rest = rest.partition(mark)
        content = message["content"]
        if not text.startswith(content, at + len(before)):
            content = content.strip()  # some templates trim
        rebuilt += before + content
        if message["role"] == "assistant" and found:
            spans.append((at + len(before), len(rebuilt)))
        at = len(rebuilt)
    if rebuilt + rest != text:
        raise HyLoError(
            f"{where}: the chat template changes these messages, so that --answers-only cannot find answers"
        )
    return tuple(spans)
