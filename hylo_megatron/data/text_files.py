"""Text files as Unicode, decompressed and decoded in blocks. Error messages name the file and the line."""

import bz2
import codecs
import gzip
import lzma
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO, NamedTuple

from hylo_megatron import packages
from hylo_megatron.errors import HyLoError

BLOCK = 1 << 20  # bytes that are decompressed and decoded together
PACKED_SUFFIXES = (".gz", ".bz2", ".xz", ".zst", ".zstd")
# The contents decide how a file is compressed, because its name may be wrong.
MAGIC = {b"\x1f\x8b": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\x00": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
# UTF-32 comes first, because its little-endian mark begins with the mark of UTF-16.
MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)


class Block(NamedTuple):
    """Decoded text. ``at``: bytes of the file read so far, for the progress display."""

    text: str
    at: int


def check_file(path: str | Path) -> Path:
    """Return ``path`` if it is a regular file. Raises ``HyLoError`` otherwise."""
    path = Path(path)
    if path.is_dir():
        raise HyLoError(
            f"{path}: a folder, expected a file of text: name the files in it, or hf://{path} for a folder that the"
            " package datasets reads"
        )
    if not path.exists():
        hub = f" (a data set of a hub is hf://{path})" if len(path.parts) == 2 and not path.suffix else ""
        raise HyLoError(f"{path}: no such file{hub}")
    if not path.is_file():
        raise HyLoError(f"{path}: not a regular file, and it has to be read twice: write the text to a file first")
    return path


def plain_suffix(path: Path) -> str:
    """Return the suffix in lower case without that of a compression: ``.jsonl`` for ``a.JSONL.gz``."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    while suffixes and suffixes[-1] in PACKED_SUFFIXES:
        suffixes.pop()
    return suffixes[-1] if suffixes else ""


def compression(path: Path) -> str | None:
    """Return gzip, bzip2, xz, zstd or None. Raises ``HyLoError`` for archives and unreadable files."""
    with _opened(path) as raw:
        start = raw.read(8)
    if start.startswith(b"PK\x03\x04"):
        raise HyLoError(f"{path}: a zip archive (or an Office document), expected text: unpack it first")
    return next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)


def read_blocks(path: Path) -> Iterator[Block]:
    """Yield the text of ``path`` in blocks. Raises ``HyLoError`` for damaged files, other encodings and NUL bytes."""
    line = 1  # line of the first character that is not decoded yet
    decoder = None
    with _opened(path) as raw:
        try:
            for data in _decompressed(raw, path):
                if decoder is None:
                    _refuse_no_text(data, path)
                    mark, encoding = next(((m, e) for m, e in MARKS if data.startswith(m)), (b"", "utf-8"))
                    decoder, data = codecs.getincrementaldecoder(encoding)(), data[len(mark) :]
                text = decoder.decode(data)
                if "\0" in text:
                    line += text[: text.index("\0")].count("\n")
                    raise HyLoError(f"{path}:{line}: a NUL byte: not text, or UTF-16 without a byte-order mark")
                line += text.count("\n")
                yield Block(text, raw.tell())
            if decoder:
                decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _undecodable(path, line, error) from None
        except (EOFError, zlib.error, lzma.LZMAError, OSError, ValueError) as error:
            reason = getattr(error, "strerror", None) or error
            raise HyLoError(
                f"{path}:{line}: the rest cannot be read ({reason}): damaged or cut off, download it again"
            ) from error


def read_lines(path: Path) -> Iterator[tuple[int, str, int]]:
    """Yield line numbers, lines with their line feeds, and the bytes of the file read so far."""
    number, rest, at = 0, "", 0
    for text, at in read_blocks(path):
        *whole, last = text.split("\n")
        if whole:
            whole[0] = rest + whole[0]
            rest = ""
        for line in whole:
            number += 1
            yield number, line + "\n", at
        rest += last
    if rest:
        yield number + 1, rest, at


def _refuse_no_text(start: bytes, path: Path) -> None:
    """Refuse other kinds of files by their decompressed beginning, which may happen to be UTF-8."""
    packed = next((name for magic, name in MAGIC.items() if start.startswith(magic)), None)
    if packed:
        raise HyLoError(f"{path}: compressed twice (inside is {packed}): unpack it once")
    if start[257:262] == b"ustar":
        raise HyLoError(f"{path}: a tar archive, expected text: unpack it first and name the files in it")
    if start.startswith(b"%PDF-"):
        raise HyLoError(f"{path}: a PDF file, expected text: extract its text first")


@contextmanager
def _opened(path: Path) -> Iterator[BinaryIO]:
    try:
        raw = path.open("rb")
    except OSError as error:
        raise HyLoError(f"{path}: cannot be read ({error.strerror})") from error
    with raw:
        yield raw


def _decompressed(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """Yield blocks of bytes. The first block is long enough for any byte-order mark, unless the file is shorter."""
    kind = compression(path)
    readers = {"gzip": gzip.open, "bzip2": bz2.open, "xz": lzma.open}
    stream = readers[kind](raw) if kind in readers else raw
    blocks = _zstd(raw, path) if kind == "zstd" else iter(lambda: stream.read(BLOCK), b"")
    start = b""
    for block in blocks:
        start += block
        if len(start) >= 4:
            break
    if start:
        yield start
    yield from filter(None, blocks)


def _zstd(raw: BinaryIO, path: Path) -> Iterator[bytes]:
    """Decompress frame by frame: the package's ``stream_reader`` ends without an error if a frame is cut off."""
    zstandard = packages.load("zstandard", f"{path}: reading it")
    frame = None
    try:
        while data := raw.read(BLOCK // 8):
            while data:
                frame = frame or zstandard.ZstdDecompressor().decompressobj()
                yield frame.decompress(data)
                data = frame.unused_data if frame.eof else b""
                frame = None if frame.eof else frame
    except zstandard.ZstdError as error:
        raise EOFError(error) from error
    if frame is not None:
        raise EOFError("the last frame has no end")


def _undecodable(path: Path, line: int, error: UnicodeDecodeError) -> HyLoError:
    before = error.object[: error.start].decode(error.encoding, "replace")
    where = f"{path}:{line + before.count(chr(10))}"
    if error.encoding != "utf-8":
        return HyLoError(f"{where}: not {error.encoding}, which the file's byte-order mark names ({error.reason})")
    packed = path.suffix.lower() in PACKED_SUFFIXES
    return HyLoError(
        f"{where}: byte 0x{error.object[error.start]:02x} is not UTF-8: {'unpack and ' * packed}convert the file, for"
        f" example from Latin-1 with iconv -f latin1 -t utf-8 {path.stem if packed else path.name}"
    )
