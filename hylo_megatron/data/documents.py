"""Documents from files of text, rows or chats, the same for every tool, with one row in memory at a time."""

import itertools
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from hylo_megatron.data import chats
from hylo_megatron.data.chat_template import ChatTemplate, Span, left_out
from hylo_megatron.data.hub import HubDataset
from hylo_megatron.data.rows import Row, container, read_rows
from hylo_megatron.data.text_files import read_lines
from hylo_megatron.errors import HyLoError

TEXT_KEY = "text"
BLOCK = 1 << 20  # characters of a plain text file that are tokenized together
MOST_DOCUMENTS = 50_000  # calibration and evaluation need only the beginning of a long file
SHOWN = 3  # reasons for skipped conversations that are shown


class Piece(NamedTuple):
    """Part of a document.

    ``last``: this piece ends the document. ``at``: bytes of the file read so far, for the progress display.
    ``answers``: the assistant's spans in ``text``, if they were requested.
    """

    text: str
    last: bool
    at: int
    answers: tuple[Span, ...] = ()


@dataclass
class Tally:
    """Counts of what was not used unchanged.

    ``changed``: conversations that the chat template does not render completely.
    """

    conversations: int = 0
    skipped: int = 0
    changed: int = 0
    surrogates: int = 0
    reasons: list[str] = field(default_factory=list)
    first_changed: str = ""
    first_surrogate: str = ""

    def lines(self) -> list[str]:
        """Return lines for the user; none if everything was used unchanged."""
        lines = []
        if self.skipped:
            lines.append(f"{self.skipped} of {self.conversations} conversations cannot be used and were skipped:")
            lines += [f"  {reason}" for reason in self.reasons]
            lines += ["  ..."] if self.skipped > len(self.reasons) else []
        if self.changed:
            lines.append(
                f"the chat template leaves out or rewrites a part of {self.changed} of {self.conversations}"
                f" conversations, that part is not in the text: first in {self.first_changed}"
            )
        if self.surrogates:
            lines.append(
                f"lone surrogates (halves of a character) in {self.surrogates} documents were replaced by U+FFFD:"
                f" first in {self.first_surrogate}"
            )
        return lines

    def check(self) -> None:
        """Refuse the file if more than half of the conversations cannot be used. Raises ``HyLoError``."""
        if 2 * self.skipped > self.conversations:
            raise HyLoError(
                f"{self.reasons[0]}; more than half of the conversations cannot be used"
                f" ({self.skipped} of {self.conversations})"
            )

    def report(self) -> None:
        for line in self.lines():
            print(line, file=sys.stderr, flush=True)

    def skip(self, where: str, reason: object) -> None:
        self.skipped += 1
        self.reasons += [f"{where}: {reason}"] if len(self.reasons) < SHOWN else []

    def whole(self, text: str, where: str) -> str:
        """Return ``text`` without lone surrogates, which neither tokenizers nor UTF-8 files accept."""
        try:
            text.encode()
        except UnicodeEncodeError:
            self.surrogates += 1
            self.first_surrogate = self.first_surrogate or where
            return _without_surrogates(text)
        return text


def detect_format(path: Path | HubDataset, form: str | None = None, text_key: str | None = None) -> str:
    """Return the format (formats.py) of the contents: plain text, rows with text, or rows with conversations.

    ``form``: the format that the user gave, if any; it is returned then. A given ``text_key`` means rows with text.
    """
    kind = container(path, form)
    if form or kind == "text":
        return form or "text"
    first = next(read_rows(path, kind, (text_key or TEXT_KEY, *chats.COLUMNS)), None)
    return "chat" if first and not text_key and chats.holds_chats(first.value, TEXT_KEY) else "jsonl"


def read_documents(
    path: Path | HubDataset,
    form: str,
    text_key: str = TEXT_KEY,
    template: ChatTemplate | None = None,
    find_answers: bool = False,
    tally: Tally | None = None,
) -> Iterator[Piece]:
    """Yield pieces of the documents in ``path``: one document per row, or for ``text`` the whole file in blocks.

    A document without text is one empty piece. Conversations that cannot be used are skipped and counted in ``tally``.
    Raises ``HyLoError`` with file and line.
    """
    if form == "text":
        yield from _text_blocks(path)
        return
    tally = Tally() if tally is None else tally
    columns = chats.COLUMNS if form == "chat" else (text_key,)
    for row in read_rows(path, container(path, form), columns):
        if form == "jsonl":
            yield Piece(tally.whole(_plain_text(row, text_key), row.where), True, row.at)
        elif piece := _chat_piece(row, template, find_answers, tally):
            yield piece


def check_texts(path: Path, form: str | None = None) -> None:
    """Raise ``HyLoError`` if one of the first ``MOST_DOCUMENTS`` rows of ``path`` cannot be read, used or not."""
    form = detect_format(path, form)
    rows = read_rows(path, container(path, form), chats.COLUMNS) if form == "chat" else read_documents(path, form)
    for _ in itertools.islice(rows, MOST_DOCUMENTS):
        pass


def read_texts(path: Path, tokenizer: Any = None, window: int | None = None, form: str | None = None) -> Iterator[str]:
    """Yield the documents of ``path`` that have text. ``form``: its format; None: as the contents say.

    ``tokenizer``: a tokenizer of transformers, which renders conversations. ``window``: split a plain text file,
    otherwise one document, into windows of this many characters. What was not used unchanged is printed at the end.
    """
    form, tally = detect_format(path, form), Tally()
    template = chat_template(tokenizer, path) if form == "chat" else None
    parts: list[str] = []
    for piece in read_documents(path, form, template=template, tally=tally):
        if form == "text" and window:
            windows = (piece.text[at : at + window] for at in range(0, len(piece.text), window))
            yield from filter(str.strip, windows)
            continue
        parts.append(piece.text)
        if piece.last:
            text, parts = "".join(parts), []
            if text.strip():
                yield text
    tally.check()
    tally.report()


def chat_template(tokenizer: Any, path: Path, where: Any = None, name: str | None = None) -> ChatTemplate:
    """Return the template for the conversations of ``path``.

    ``where``: the tokenizer's folder, for the message. Raises ``HyLoError`` if the tokenizer has no template.
    """
    template = tokenizer if isinstance(tokenizer, ChatTemplate) else tokenizer and ChatTemplate.of(tokenizer)
    where = where or getattr(tokenizer, "name_or_path", "the tokenizer")
    if not template:
        raise HyLoError(f"{where}: has no chat template, which {path} needs: use an instruct model's tokenizer")
    return template.choose(name, where)


def _text_blocks(path: Path) -> Iterator[Piece]:
    """Yield a plain text file in blocks, with Windows line ends as line feeds.

    Blocks end only between a line that ends in text and a line that begins with text. No token spans such a position,
    since byte-level tokenizers join a line end only to white space that follows it.
    """
    block: list[str] = []
    size = at = 0
    for _, line, at in read_lines(path):
        if size >= BLOCK and line[:1].strip() and block[-1].strip():
            yield Piece("".join(block), False, at)
            block, size = [], 0
        block.append(f"{line[:-2]}\n" if line.endswith("\r\n") else line)
        size += len(line)
    yield Piece("".join(block), True, at)


def _plain_text(row: Row, text_key: str) -> str:
    if not isinstance(row.value, dict):
        raise HyLoError(f'{row.where}: a JSON {type(row.value).__name__}, expected an object with "{text_key}"')
    text = row.value.get(text_key)
    if text is None and text_key in row.value:
        return ""
    if not isinstance(text, str) and text_key in row.value:
        raise HyLoError(
            f"{row.where}: expected a string under '{text_key}', found {chats.kind_of(text)}: write the text as one"
            " string, or name another key with --text-key of hylo prepare-data"
        )
    if not isinstance(text, str):
        keys = ", ".join(map(repr, row.value)) or "none"
        raise HyLoError(
            f"{row.where}: expected a string under '{text_key}', the keys are {keys}: name the right one with"
            " --text-key of hylo prepare-data"
        )
    return text


def _chat_piece(row: Row, template: ChatTemplate, find_answers: bool, tally: Tally) -> Piece | None:
    tally.conversations += 1
    try:
        chat, text = template.render(chats.read_chat(row.value))
        if tally.whole(text, row.where) != text:
            chat, text = template.render(chats.read_chat(_without_surrogates(row.value)))
        answers = template.answers(chat, text) if find_answers else ()
    except chats.Unusable as reason:
        tally.skip(row.where, reason)
        return None
    if what := left_out(chat, text):
        tally.changed += 1
        tally.first_changed = tally.first_changed or f"{row.where} ({what})"
    return Piece(text, True, row.at, answers)


def _without_surrogates(value: Any) -> Any:
    if isinstance(value, str):
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    if isinstance(value, dict):
        return {_without_surrogates(key): _without_surrogates(item) for key, item in value.items()}
    return [_without_surrogates(item) for item in value] if isinstance(value, list) else value
