"""Debian packages: downloaded once with apt-get into a cache folder and read in memory, never installed or
unpacked.
"""

import io
import lzma
import os
import re
import shutil
import subprocess
import tarfile
import tempfile
import time
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from hylo_megatron.corpus.download import CACHE_VARIABLE, sha256_of
from hylo_megatron.errors import HyLoError

_AR_MAGIC = b"!<arch>\n"
_AR_HEADER = 60  # bytes: name 16, time 12, owner 6, group 6, mode 8, size 10, end mark 2


@dataclass(frozen=True)
class Deb:
    """One package of Debian 12's main archive, for all architectures. ``version``: the expected version.

    A mirror keeps only the newest version. If the expected version is gone, the newest one is used, with a warning.
    """

    package: str
    version: str
    sha256: str

    @property
    def file_name(self) -> str:
        return f"{self.package}_{self.version.replace(':', '%3a')}_all.deb"


def fetch_deb(deb: Deb, cache: Path) -> tuple[Path, Deb]:
    """Return the package's file in ``cache``, downloaded if missing, and its real version and sha256."""
    path = cache / deb.file_name
    if path.is_file():
        if sha256_of(path) == deb.sha256:
            return path, deb
        print(f"{path}: damaged (wrong sha256), fetching it again", flush=True)
        path.unlink()
    others = sorted(cache.glob(f"{deb.package}_*_all.deb"), key=lambda other: other.stat().st_mtime)
    return _described(others[-1] if others else _download(deb, cache), deb)


def _described(path: Path, expected: Deb) -> tuple[Path, Deb]:
    """Return ``path`` with its real version and sha256.

    Raises ``HyLoError`` if the expected version has other content, and warns about another version.
    """
    version, digest = path.name.split("_")[1].replace("%3a", ":"), sha256_of(path)
    if version == expected.version and digest != expected.sha256:
        path.unlink()
        raise HyLoError(
            f"{path.name}: sha256 is {digest}, expected {expected.sha256}: the mirror or a proxy serves another "
            "file; try again, or use another mirror"
        )
    if version != expected.version:
        print(
            f"warning: {expected.package} {version} is used for want of {expected.version}: its text differs somewhat",
            flush=True,
        )
    return path, Deb(expected.package, version, digest)


def _download(deb: Deb, cache: Path) -> Path:
    if not shutil.which("apt-get"):
        raise HyLoError(
            f"{deb.package} cannot be downloaded without apt-get: run this on a Debian or Ubuntu machine or container,"
            " or give hylo prepare-data your own text"
        )
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {deb.package} {deb.version}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="download.", dir=cache) as folder:
        result = _apt_get(f"{deb.package}={deb.version}", folder)
        if re.search(r"^E: Version .* was not found", result.stderr, re.MULTILINE):
            result = _apt_get(deb.package, folder)
        found = sorted(Path(folder).glob(f"{deb.package}_*_all.deb"))
        if result.returncode or not found:
            raise _download_failed(deb, result, cache)
        path = cache / found[0].name
        os.replace(found[0], path)
    print(f"  {path.stat().st_size / 1e6:.1f} MB in {time.monotonic() - began:.1f} s", flush=True)
    return path


def _apt_get(what: str, folder: str) -> subprocess.CompletedProcess:
    command = ["apt-get", "download", "--quiet", "-o", "Acquire::Retries=5", what]
    environment = {**os.environ, "LC_ALL": "C"}  # apt-get's messages are parsed here
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


def _download_failed(deb: Deb, result: subprocess.CompletedProcess, cache: Path) -> HyLoError:
    if "No space left on device" in result.stderr:
        return HyLoError(
            f"no space left in {cache}: free some, or choose another folder with --cache or ${CACHE_VARIABLE}"
        )
    reasons = re.findall(r"^E: (.+)$", result.stderr, re.MULTILINE)
    reason = reasons[0] if reasons else f"exit code {result.returncode}"
    return HyLoError(
        f"apt-get could not download {deb.package} ({reason[:200]}): run 'apt-get update' and try again; if the "
        f"package is unknown, use a Debian 12 machine or container, or put {deb.file_name} into {cache} yourself"
    )


def _ar_members(data: bytes) -> Iterator[tuple[str, memoryview]]:
    """Yield (name, content) of the members of an ``ar`` archive."""
    if not data.startswith(_AR_MAGIC):
        raise ValueError("not an ar archive")
    at = len(_AR_MAGIC)
    while at + _AR_HEADER <= len(data):
        header = data[at : at + _AR_HEADER]
        size = int(header[48:58])
        yield header[:16].decode("ascii").rstrip(" /"), memoryview(data)[at + _AR_HEADER : at + _AR_HEADER + size]
        at += _AR_HEADER + size + size % 2  # members begin at even offsets


def _unpacked(name: str, content: memoryview) -> bytes:
    """Return the tar file in ``data.tar.xz``, ``.gz`` or uncompressed."""
    if name.endswith(".xz"):
        return lzma.decompress(content)
    if name.endswith(".gz"):
        return zlib.decompress(content, wbits=31)
    if name.endswith(".tar"):
        return bytes(content)
    raise ValueError(f"{name} is packed in a way that Python's library cannot read")


class DebFile:
    """The regular files of a .deb, read in memory with the interface of ``zipfile.ZipFile``: ``namelist`` and
    ``read``.

    Names are as in the package, without the leading "./". Names are only looked up: nothing is written to the disk.
    """

    def __init__(self, path: Path):
        self.filename = str(path)
        try:
            name, content = next(
                (name, content) for name, content in _ar_members(path.read_bytes()) if name.startswith("data.tar")
            )
            self._tar = tarfile.TarFile(fileobj=io.BytesIO(_unpacked(name, content)))
            self._members = {
                member.name.removeprefix("./"): member for member in self._tar.getmembers() if member.isfile()
            }
        except (StopIteration, ValueError, lzma.LZMAError, zlib.error, tarfile.TarError) as error:
            raise HyLoError(f"{path}: not a readable Debian package ({error}): delete it, then try again") from error

    def __enter__(self) -> "DebFile":
        return self

    def __exit__(self, *_) -> None:
        self._tar.close()

    def namelist(self) -> list[str]:
        return list(self._members)

    def read(self, name: str) -> bytes:
        """Return the content of one file. Raises ``KeyError`` if there is no such name."""
        return self._tar.extractfile(self._members[name]).read()

    def open(self, name: str) -> io.BufferedReader:
        """Return the content of one file as a stream, for large files."""
        return self._tar.extractfile(self._members[name])
