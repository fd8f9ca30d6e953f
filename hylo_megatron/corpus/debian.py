"""Debian packages: fetched once with apt-get into a cache folder, read in memory with dpkg-deb, never installed."""

import io
import os
import re
import shutil
import subprocess
import tarfile
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

from hylo_megatron.corpus.download import check_sha256, download, is_cached, reasons, sha256_of
from hylo_megatron.errors import HyLoError


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
    if is_cached(path, deb.sha256):
        return path, deb
    others = sorted(cache.glob(f"{deb.package}_*_all.deb"), key=lambda other: other.stat().st_mtime)
    path = others[-1] if others else download(f"{deb.package} {deb.version}", cache, partial(_apt_download, deb))
    found = replace(deb, version=path.name.split("_")[1].replace("%3a", ":"), sha256=sha256_of(path))
    if found.version != deb.version:
        print(
            f"warning: {deb.package} {found.version} is used for want of {deb.version}: its text differs somewhat",
            flush=True,
        )
    return path, found


def _apt_download(deb: Deb, folder: Path) -> Path:
    if not shutil.which("apt-get"):
        raise HyLoError(
            f"{deb.package} cannot be downloaded without apt-get: run this on a Debian or Ubuntu machine or container,"
            " or give hylo prepare-data your own text"
        )
    result = _apt_get(f"{deb.package}={deb.version}", folder)
    if re.search(r"^E: Version .* was not found", result.stderr, re.MULTILINE):
        result = _apt_get(deb.package, folder)
    found = sorted(folder.glob(f"{deb.package}_*_all.deb"))
    if result.returncode or not found:
        raise HyLoError(
            f"apt-get could not download {deb.package} ({reasons(result, 'E', folder.parent)[0]}): run 'apt-get"
            f" update' and try again; if the package is unknown, use a Debian 12 machine or container, or put"
            f" {deb.file_name} into {folder.parent} yourself"
        )
    if found[0].name == deb.file_name:
        check_sha256(found[0], deb.sha256)
    return found[0]


def _apt_get(what: str, folder: Path) -> subprocess.CompletedProcess:
    command = ["apt-get", "download", "--quiet", "-o", "Acquire::Retries=5", what]
    environment = {**os.environ, "LC_ALL": "C"}  # apt-get's messages are parsed here
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


class DebFile:
    """The regular files of a .deb, read in memory with the interface of ``zipfile.ZipFile``: ``namelist``, ``read``.

    Names are as in the package, without the leading "./". Names are only looked up: nothing is written to the disk.
    """

    def __init__(self, path: Path):
        self.filename = str(path)
        if not shutil.which("dpkg-deb"):
            raise HyLoError(f"{path}: cannot be read without dpkg-deb; run this on a Debian or Ubuntu machine")
        command = ["dpkg-deb", "--fsys-tarfile", path]
        result = subprocess.run(command, env={**os.environ, "LC_ALL": "C"}, capture_output=True)
        if result.returncode:
            reason = result.stderr.decode(errors="replace").strip().splitlines()[-1:] or ["no reason given"]
            raise HyLoError(f"{path}: not a readable Debian package ({reason[0]}): delete it, then try again")
        self._tar = tarfile.TarFile(fileobj=io.BytesIO(result.stdout))
        self._members = {entry.name.removeprefix("./"): entry for entry in self._tar.getmembers() if entry.isfile()}

    def __enter__(self) -> "DebFile":
        return self

    def __exit__(self, *_) -> None:
        self._tar.close()

    def namelist(self) -> list[str]:
        return list(self._members)

    def read(self, name: str) -> bytes:
        """Return the content of one file. Raises ``KeyError`` if there is no such name."""
        return self._tar.extractfile(self._members[name]).read()
