"""Wheels and Debian packages made in memory, for the tests of what reads them."""

import hashlib
import io
import lzma
import tarfile
import zipfile
import zlib
from pathlib import Path

from hylo_megatron.corpus.debian import Deb
from hylo_megatron.corpus.download import Wheel

Members = dict[str, str | bytes]


def _bytes(content: str | bytes) -> bytes:
    return content.encode() if isinstance(content, str) else content


def zip_bytes(members: Members) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def cached_wheel(cache: Path, name: str, members: Members) -> Wheel:
    content = zip_bytes(members)
    cache.mkdir(exist_ok=True)
    (cache / f"{name}.whl").write_bytes(content)
    return Wheel(name, "1.0", f"{name}.whl", hashlib.sha256(content).hexdigest())


def tar_bytes(members: Members, links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(_bytes(content))
            archive.addfile(entry, io.BytesIO(_bytes(content)))
        for name, target in (links or {}).items():
            entry = tarfile.TarInfo(name)
            entry.type, entry.linkname = tarfile.SYMTYPE, target
            archive.addfile(entry)
    return buffer.getvalue()


def ar_bytes(members: Members) -> bytes:
    out = b"!<arch>\n"
    for name, content in members.items():
        size = len(_bytes(content))
        out += f"{name:<16}{0:<12}{0:<6}{0:<6}{644:<8}{size:<10}`\n".encode() + _bytes(content) + b"\n" * (size % 2)
    return out


def deb_bytes(members: Members, links: dict[str, str] | None = None, packing: str = "xz") -> bytes:
    pack = {"xz": lzma.compress, "gz": lambda data: zlib.compress(data, wbits=31)}[packing]
    data = pack(tar_bytes({f"./{name}": content for name, content in members.items()}, links))
    return ar_bytes({"debian-binary": "2.0\n", "control.tar.xz": "odd", f"data.tar.{packing}": data})


def cached_deb(cache: Path, name: str, members: Members) -> Deb:
    content = deb_bytes(members)
    deb = Deb(name, "1:1.0-1", hashlib.sha256(content).hexdigest())
    cache.mkdir(exist_ok=True)
    (cache / deb.file_name).write_bytes(content)
    return deb
