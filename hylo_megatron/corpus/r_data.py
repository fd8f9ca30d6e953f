"""Text vectors of an installed R package, read without R: the two files of its data (name.rdx, name.rdb)."""

import gzip
import struct
import zlib
from typing import Any

_REFERENCE, _NO_VALUE, _SYMBOL, _PAIRS, _CHARACTERS = 255, 254, 1, 2, 9
_LOGICALS, _INTEGERS, _REALS, _STRINGS, _LIST = 10, 13, 14, 16, 19
_HAS_ATTRIBUTES, _HAS_TAG = 0x200, 0x400


class _Reader:
    """A reader of R's binary serialisation. Vectors become lists; a list with names becomes a dict."""

    def __init__(self, content: bytes):
        if content[:2] != b"X\n":
            raise ValueError("not R's binary format")
        self._content, self._at = content, 2
        self._symbols: list[str] = []
        version = self._numbers("i", 3)[0]
        if version == 3:  # the native encoding's name follows
            self._take(self._number())

    def value(self) -> Any:
        flags = self._number()
        kind = flags & 0xFF
        if kind == _NO_VALUE:
            return None
        if kind == _REFERENCE:
            return self._symbols[(flags >> 8) - 1]
        if kind == _SYMBOL:
            self._symbols.append(self.value())
            return self._symbols[-1]
        if kind == _CHARACTERS:
            size = self._number()
            return "" if size < 0 else self._take(size).decode("utf-8", "replace")
        if kind == _PAIRS:
            return self._pairs(flags)
        found = self._vector(kind)
        attributes = self.value() if flags & _HAS_ATTRIBUTES else {}
        return dict(zip(attributes["names"], found, strict=True)) if "names" in attributes else found

    def _vector(self, kind: int) -> list:
        size = self._number()
        if kind in (_LOGICALS, _INTEGERS):
            return list(self._numbers("i", size))
        if kind == _REALS:
            return list(self._numbers("d", size))
        if kind in (_STRINGS, _LIST):
            return [self.value() for _ in range(size)]
        raise ValueError(f"R objects of kind {kind} are not read")

    def _pairs(self, flags: int) -> dict[str, Any]:
        attributes = self.value() if flags & _HAS_ATTRIBUTES else None
        tag = self.value() if flags & _HAS_TAG else ""
        first = self.value()
        return {**(attributes or {}), tag: first, **(self.value() or {})}

    def _number(self) -> int:
        return self._numbers("i", 1)[0]

    def _numbers(self, code: str, count: int) -> tuple:
        return struct.unpack(f">{count}{code}", self._take(count * struct.calcsize(code)))

    def _take(self, size: int) -> bytes:
        self._at += size
        return self._content[self._at - size : self._at]


def text_vectors(index: bytes, data: bytes) -> dict[str, list[str]]:
    """Return the character vectors of a package's data by name. Raises ``ValueError`` if the format is another."""
    try:
        places = _Reader(gzip.decompress(index)).value()["variables"]
        values = {}
        for name, (start, size) in places.items():
            # a record is its size in 4 bytes and the deflated value
            values[name] = _Reader(zlib.decompress(data[start + 4 : start + size])).value()
    except (struct.error, zlib.error, OSError, IndexError, KeyError, TypeError) as error:
        raise ValueError(f"not an R package's data ({type(error).__name__}: {error})") from error
    return {name: value for name, value in values.items() if isinstance(value, list) and value}
