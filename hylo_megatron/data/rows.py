"""Rows of JSON lines, JSON arrays, csv, tsv and parquet files, and whether a file has rows or plain text."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from hylo_megatron import json_file, packages
from hylo_megatron.data.chats import KEYS
from hylo_megatron.data.hub import HubDataset
from hylo_megatron.data.text_files import PACKED_SUFFIXES, check_file, plain_suffix, read_blocks, read_lines
from hylo_megatron.errors import HyLoError, first_line

TEXT_SUFFIXES = (".txt", ".text", ".md", ".rst")
JSON_SUFFIXES = (".json", ".jsonl", ".ndjson")
CSV_DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET_ROWS = 64  # rows that are decoded together
LONG_LINE = 1 << 16  # characters; a longer line that begins with a brace is treated as JSON without parsing
CELL_LIMIT = 1 << 30  # maximum number of characters in one csv cell
ROW_KEYS = ("text", *KEYS)
EXAMPLE = 'expected one on each line, such as {"text": "..."}'
JSON_ADVICE = "expected one object on each line, or an array of objects, with null for a missing value"
SPACE = re.compile(r"[ \t\r\n]*")
_DECODER = json.JSONDecoder()  # finds the end of a value; json_file decides what the value may contain


class Row(NamedTuple):
    """A row of a file. ``where``: file and line, for messages. ``at``: bytes of the file read so far."""

    where: str
    value: Any
    at: int


def container(path: Path | HubDataset, form: str | None = None) -> str:
    """Return the layout of ``path``: text, lines, values, csv, parquet or hub.

    The contents decide, and the suffix where the contents leave a choice. ``form``: the format that the user gave, see
    ``formats.py``. Raises ``HyLoError`` for empty and unreadable files.
    """
    if isinstance(path, HubDataset):
        if form == "text":
            raise HyLoError(f"{path}: has rows, which --format text does not read: use jsonl or chat, or leave it out")
        return "hub"
    suffix = plain_suffix(check_file(path))
    if form != "text" and (suffix == ".parquet" or _starts_with(path, b"PAR1")):
        return _parquet(path)
    number, head = _beginning(path)
    if form == "text" or (form is None and suffix in TEXT_SUFFIXES and not _begins_with_row(head)):
        return "text"
    if suffix in CSV_DELIMITERS:
        return "csv"
    if head.startswith("[") and (suffix in JSON_SUFFIXES or form or re.match(r"\[\s*(\{|$)", head)):
        return "values"
    line, more, _ = head.partition("\n")
    if head.startswith("{") and (_is_object(line) or (not more and len(head) > LONG_LINE)):
        return "lines"
    if head.startswith("{") and suffix == ".json":
        return "values"
    if form is None and suffix not in JSON_SUFFIXES:
        return "text"
    if head.startswith("{"):
        return "lines"  # the reader reports what is wrong with the first line
    raise HyLoError(f"{path}:{number}: not a JSON object: {EXAMPLE}")


def read_rows(path: Path | HubDataset, kind: str, columns: tuple[str, ...]) -> Iterator[Row]:
    """Yield the rows of ``path``. ``kind``: see ``container``. Only ``columns`` of csv and parquet files are read."""
    if kind == "hub":
        rows = enumerate(path.rows(), 1)
        return (Row(f"{path}: row {number}", _cleaned(value), 0) for number, value in rows)
    if kind == "parquet":
        return _parquet_rows(path, columns)
    if kind == "csv":
        return _csv_rows(path, columns)
    return _values(path) if kind == "values" else _json_lines(path)


def _starts_with(path: Path, magic: bytes) -> bool:
    with path.open("rb") as file:
        return file.read(len(magic)) == magic


def _beginning(path: Path) -> tuple[int, str]:
    """Return the line number of the first text, and the text from there to the end of its block."""
    line = 1
    for text, _ in read_blocks(path):
        if head := text.lstrip():
            return line + text[: len(text) - len(head)].count("\n"), head
        line += text.count("\n")
    raise HyLoError(f"{path}: the file is empty, expected text or rows with text")


def _begins_with_row(head: str) -> bool:
    """Return whether a file with the name of plain text begins with a row of text or of a conversation."""
    start = SPACE.match(head, head.startswith("[")).end()
    try:
        value, _ = _DECODER.raw_decode(head, start)
    except (ValueError, RecursionError):
        return False
    return isinstance(value, dict) and any(isinstance(value.get(key), str | list) for key in ROW_KEYS)


def _is_object(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def _json_lines(path: Path) -> Iterator[Row]:
    for number, line, at in read_lines(path):
        if line.strip():
            where = f"{path}:{number}"
            yield Row(where, json_file.parse(line, where, JSON_ADVICE), at)


def _values(path: Path) -> Iterator[Row]:
    """Yield the values of a JSON array, or consecutive JSON values on any number of lines, one in memory at a time."""
    text = _Window(path)
    in_array = text.take("[")
    more = not (in_array and text.take("]"))
    while more and text.skip():
        where, value = text.value()
        yield Row(where, value, text.at)
        if in_array:
            more = text.take(",")
            if not more and not text.take("]"):
                raise HyLoError(f"{text.where()}: not valid JSON: expected a comma or the end of the array")
    if in_array and (more or text.skip()):
        what = "text behind the array" if text.skip() else "the array has no end: is the file cut off?"
        raise HyLoError(f"{text.where()}: not valid JSON: {what}")


class _Window:
    """The part of a file that is being parsed."""

    def __init__(self, path: Path):
        self.path, self.blocks = path, read_blocks(path)
        self.text, self.start, self.line, self.at = "", 0, 1, 0

    def where(self) -> str:
        return f"{self.path}:{self.line}"

    def skip(self) -> bool:
        """Move to the next character that is not white space. Return False at the end of the file."""
        while True:
            self._move(SPACE.match(self.text, self.start).end())
            if self.start < len(self.text):
                return True
            if not self._more():
                return False

    def take(self, character: str) -> bool:
        found = self.skip() and self.text[self.start] == character
        self._move(self.start + found)
        return found

    def value(self) -> tuple[str, Any]:
        where = self.where()
        while True:
            try:
                _, end = _DECODER.raw_decode(self.text, self.start)
                break
            except RecursionError:
                raise HyLoError(f"{where}: not valid JSON (nested too deeply)") from None
            except json.JSONDecodeError as error:
                # A value that continues in the next block fails at the end of this block, or as an unterminated
                # string.
                open_end = error.msg.startswith("Unterminated") or error.pos > len(self.text) - 16
                if not (open_end and self._more()):
                    line = self.line + self.text.count("\n", self.start, error.pos)
                    raise HyLoError(f"{self.path}:{line}: not valid JSON ({error.msg})") from None
        value = json_file.parse(self.text[self.start : end], where, JSON_ADVICE)
        self._move(end)
        return where, value

    def _move(self, to: int) -> None:
        self.line += self.text.count("\n", self.start, to)
        self.start = to

    def _more(self) -> bool:
        """Append as many characters as the window has already, so that a long value is not parsed over and over."""
        parts, wanted = [self.text[self.start :]], max(1, len(self.text) - self.start)
        while wanted > 0 and (block := next(self.blocks, None)):
            parts.append(block.text)
            wanted -= len(block.text)
            self.at = block.at
        found = len(parts) > 1
        self.text, self.start = "".join(parts), 0
        return found


def _csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """Yield the rows of a csv file with Python's reader, which knows the line of each row."""
    csv.field_size_limit(CELL_LIMIT)
    read = [0]

    def lines() -> Iterator[str]:
        for _, line, at in read_lines(path):
            read[0] = at
            yield line

    first = next(line for _, line, _ in read_lines(path) if line.strip())
    named = [CSV_DELIMITERS[plain_suffix(path)], ";", "\t", ","]
    delimiter = next((d for d in named if set(columns) & set(next(csv.reader([first], delimiter=d), []))), named[0])
    reader, header, number = csv.reader(lines(), delimiter=delimiter, strict=True), None, 1
    try:
        for cells in reader:
            where, number = f"{path}:{number}", reader.line_num + 1
            if not cells:
                continue
            if header is None:
                header = cells
            elif len(cells) != len(header):
                raise HyLoError(f"{where}: {len(cells)} columns, expected {len(header)} as in the first line")
            else:
                yield Row(where, dict(zip(header, cells, strict=True)), read[0])
    except csv.Error as error:
        raise HyLoError(f"{path}:{number}: not valid csv ({error})") from None


def _parquet(path: Path) -> str:
    if path.suffix.lower() in PACKED_SUFFIXES:
        raise HyLoError(f"{path}: a compressed parquet file: unpack it first, parquet is compressed inside")
    if not _starts_with(path, b"PAR1"):
        raise HyLoError(f"{path}: not a parquet file: it does not begin with PAR1")
    return "parquet"


def _parquet_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    packages.load("datasets", f"{path}: reading parquet", "pyarrow.parquet")
    import pyarrow.parquet

    number, size = 0, path.stat().st_size
    try:
        with pyarrow.parquet.ParquetFile(path, pre_buffer=False) as file:
            names, total = file.schema_arrow.names, max(1, file.metadata.num_rows)
            wanted = [name for name in names if name in columns] or names  # an error message lists all names
            for batch in file.iter_batches(PARQUET_ROWS, columns=wanted):
                for value in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", _cleaned(value), size * number // total)
    except (pyarrow.ArrowException, OSError) as error:
        raise HyLoError(
            f"{path}: row {number + 1} cannot be read ({first_line(error)}): damaged, download it again"
        ) from error


def _cleaned(row: dict) -> dict:
    """Return ``row`` without nulls inside its columns."""
    return {key: _without_nulls(item) for key, item in row.items()}


def _without_nulls(value: Any) -> Any:
    """Remove nulls: Arrow gives every object the keys of all others, with null where the data has no value."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
