"""Checks of the token files ``PREFIX.bin`` and ``.idx`` before anything reads them, without torch and megatron-core.

megatron-core maps both files into memory and trusts ``.idx``. A wrong pointer trains on the wrong text. A pointer
beyond the end causes a traceback or a killed process hours later.
"""

import struct
from pathlib import Path
from typing import Literal

import numpy as np
from pydantic import ConfigDict
from typing_extensions import TypedDict

from hylo_megatron.convert.tokenizer_files import TokenizerIdentity
from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import Count, Size, read_json

REMEDY = "make the tokens again, or copy both files again"
MAGIC = b"MMIDIDX\x00\x00"
HEADER = struct.Struct("<9sQBQQ")  # magic, version, code of the type, sequences, documents plus one
# the integer types of megatron.core.datasets.indexed_dataset.DType
TYPES = {1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 8: np.uint16}
CHUNK = 1 << 22  # entries of an index that are checked together
# number of parts whose ids are checked, and ids per part; a smaller file is checked completely
PARTS, PART = 64, 1 << 16


class Summary(TypedDict, total=False):
    """The contents of ``PREFIX.json``, which ``hylo prepare-data`` and ``hylo make-retrieval`` write."""

    __pydantic_config__ = ConfigDict(extra="allow")

    tokens: Count
    documents: Count
    sequences: Count
    pack_length: Size | None
    dropped_tokens: Count
    vocab_size: Size
    eod_id: Count
    append_eod: bool
    tokenizer: str
    dtype: Literal["uint8", "int8", "int16", "int32", "int64", "uint16"]


def check_prefix(path: str | Path) -> None:
    """Refuse the name of a token file in place of its prefix. Raises ``HyLoError``."""
    prefix = Path(path).with_suffix("")
    if Path(path).suffix in (".bin", ".idx") and Path(f"{prefix}.idx").is_file():
        raise HyLoError(f"{path}: one file of the tokens; give their prefix, {prefix}")


def read_summary(prefix: str | Path, needed: tuple[str, ...] = ()) -> Summary:
    """Read ``PREFIX.json``. Raises ``HyLoError`` if it is missing, malformed or lacks one of ``needed``."""
    path, advice = Path(f"{prefix}.json"), "expected the file that hylo prepare-data wrote beside the tokens"
    summary = read_json(path, Summary, advice)
    if missing := [key for key in needed if key not in summary]:
        raise HyLoError(f"{path}: no {', '.join(missing)}: {advice}")
    return summary


def read_answers(prefix: str | Path, shape: tuple[int, int]) -> np.ndarray | None:
    """Return ``PREFIX.answers.npy`` of ``hylo make-retrieval``: 1 at each token of an answer. None if there is none.

    ``shape``: sequences, and tokens of each. Raises ``HyLoError`` for a damaged file, or one of another shape.
    """
    path = Path(f"{prefix}.answers.npy")
    if not path.is_file():
        return None
    try:
        answers = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise HyLoError(f"{path}: damaged ({error}): make the samples again") from None
    if answers.dtype != np.uint8 or answers.shape != shape:
        raise HyLoError(f"{path}: {answers.dtype} of shape {answers.shape}, expected uint8 of {shape}")
    return answers


def check_packed(prefixes: list[str], seq_length: int) -> bool:
    """Return whether the files are packed for ``seq_length``. Raises ``HyLoError`` for other lengths and mixtures."""
    summaries = {prefix: read_summary(prefix) if Path(f"{prefix}.json").is_file() else {} for prefix in prefixes}
    lengths = {prefix: summary.get("pack_length") for prefix, summary in summaries.items()}
    if not any(lengths.values()):
        return False
    for prefix, length in lengths.items():
        if length != seq_length + 1:
            found = f"packed to {length} tokens" if length else "not packed"
            raise HyLoError(
                f"--data-path {prefix} is {found}: --seq-length {seq_length} needs sequences of {seq_length + 1};"
                f" make it with --pack-length {seq_length + 1}"
            )
    return True


def check_made_with(prefix: str | Path, identity: TokenizerIdentity, tokenizer: str | Path) -> None:
    """Refuse tokens that, according to ``PREFIX.json``, another tokenizer than ``identity`` made.

    ``tokenizer``: the folder of ``identity``. Token files of other programs have no ``PREFIX.json`` and pass. Raises
    ``HyLoError``.
    """
    if not Path(f"{prefix}.json").is_file():
        return
    made = read_summary(prefix)
    same = made.get("tokenizer_fingerprint", identity.fingerprint) == identity.fingerprint
    if same and made.get("vocab_size", identity.size) == identity.size:
        return
    raise HyLoError(
        f"{prefix}.bin was made with another tokenizer ({made.get('tokenizer', 'unknown')},"
        f" {made.get('vocab_size', 'unknown')} tokens) than {tokenizer} ({identity.size} tokens); make the tokens"
        " again with that one"
    )


def check_token_files(prefix: str | Path, vocab_size: int | None = None) -> None:
    """Refuse a malformed ``PREFIX.idx`` and a ``PREFIX.bin`` that does not belong to it.

    With ``vocab_size``, ids beyond it are refused too: all ids of a file of up to 4M tokens are checked, and 64 parts
    of a larger file. Raises ``HyLoError``.
    """
    if "://" in str(prefix):  # megatron-core reads such prefixes from an object store
        return
    index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
    if not index.is_file():
        check_prefix(prefix)
    for path in (index, data):
        if not path.is_file():
            raise HyLoError(f"{path} not found: expected the prefix of tokens made by hylo prepare-data")
    dtype, lengths, pointers, documents = _read_index(index)
    tokens = _check_sequences(index, lengths, pointers, dtype.itemsize)
    _check_documents(index, documents, len(lengths))
    if data.stat().st_size != tokens * dtype.itemsize:
        raise HyLoError(
            f"{data} has {data.stat().st_size} bytes, expected {tokens * dtype.itemsize} for the {tokens} tokens of"
            f" {index.name}: {REMEDY}"
        )
    if not tokens:
        raise HyLoError(f"{data} holds no tokens: make it from more text")
    if vocab_size is not None:
        _check_ids(data, np.memmap(data, dtype, "r"), vocab_size)


def _read_index(path: Path) -> tuple[np.dtype, np.ndarray, np.ndarray, np.ndarray]:
    """Return the ids' type, the sequences' lengths and byte offsets, and the first sequences of documents."""
    size = path.stat().st_size
    with path.open("rb") as file:
        head = file.read(HEADER.size)
    if len(head) < HEADER.size:
        raise HyLoError(f"{path} has {size} bytes, expected at least {HEADER.size} of a header: {REMEDY}")
    magic, version, code, sequences, documents = HEADER.unpack(head)
    if magic != MAGIC or version != 1:
        raise HyLoError(f"{path} is not an index of tokens (its first bytes are {head[:17]!r}): {REMEDY}")
    if code not in TYPES:
        raise HyLoError(f"{path}: tokens of type {code}, expected an integer type (one of {sorted(TYPES)}): {REMEDY}")
    expected = HEADER.size + 12 * sequences + 8 * documents
    if size not in (expected, expected + sequences):  # the second size has one mode per sequence
        raise HyLoError(
            f"{path} has {size} bytes, expected {expected} for the {sequences} sequences and {documents} document"
            f" marks of its header: {REMEDY}"
        )

    def part(kind: str, offset: int, count: int) -> np.ndarray:
        return np.memmap(path, kind, "r", offset, (count,)) if count else np.empty(0, kind)

    places = HEADER.size + 4 * sequences
    return (
        np.dtype(TYPES[code]), part("<i4", HEADER.size, sequences), part("<i8", places, sequences),
        part("<i8", places + 8 * sequences, documents),
    )  # fmt: skip


def _check_sequences(path: Path, lengths: np.ndarray, pointers: np.ndarray, itemsize: int) -> int:
    """Return the number of tokens. The sequences must follow one another without gaps, as every writer leaves them."""
    tokens = 0
    for start in range(0, len(lengths), CHUNK):
        part = lengths[start : start + CHUNK].astype(np.int64)
        if (bad := part < 0).any():
            at = int(bad.argmax())
            raise HyLoError(f"{path}: sequence {start + at} has the length {part[at]}: {REMEDY}")
        ends = tokens + np.cumsum(part)
        expected = (ends - part) * itemsize
        found = pointers[start : start + CHUNK]
        if (bad := found != expected).any():
            at = int(bad.argmax())
            raise HyLoError(
                f"{path}: sequence {start + at} begins at byte {found[at]}, expected {expected[at]}: {REMEDY}"
            )
        tokens = int(ends[-1])
    return tokens


def _check_documents(path: Path, documents: np.ndarray, sequences: int) -> None:
    last = 0
    for start in range(0, len(documents), CHUNK):
        part = np.concatenate([[last], documents[start : start + CHUNK]])
        if (np.diff(part) < 0).any():
            raise HyLoError(f"{path}: the marks of documents do not rise: {REMEDY}")
        last = int(part[-1])
    if not len(documents) or documents[0] != 0 or last != sequences:
        raise HyLoError(f"{path}: the marks of documents do not lead from 0 to {sequences} sequences: {REMEDY}")


def _check_ids(path: Path, ids: np.ndarray, vocab_size: int) -> None:
    parts = min(PARTS, -(-len(ids) // PART))
    for start in np.linspace(0, max(0, len(ids) - PART), parts, dtype=np.int64):
        part = ids[start : start + PART]
        for at in (int(part.argmin()), int(part.argmax())):
            if not 0 <= part[at] < vocab_size:
                raise HyLoError(
                    f"{path}: token {start + at} is {part[at]}, expected 0 to {vocab_size - 1}: make the tokens with"
                    " the tokenizer of this model"
                )
