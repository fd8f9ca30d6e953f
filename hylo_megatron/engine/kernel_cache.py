"""Where compiled kernels and tuning results are kept, so that no other process, run or machine makes them again."""

import json
import os
import sys
from pathlib import Path

from hylo_megatron.engine.patch import installed_version
from hylo_megatron.engine.register import install, lists, patches
from hylo_megatron.files import whole_file

FOLDER = "HYLO_KERNEL_CACHE"  # in the environment: a folder for all of the caches below
# Variables of the libraries, and the folders inside FOLDER
CACHES = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor", "TILELANG_CACHE_DIR": "tilelang",
          "CUDA_CACHE_PATH": "cuda"}  # fmt: skip
TUNING = "TRITON_CACHE_AUTOTUNING"
PLACE = "folder.txt"  # in FOLDER: the path under which Triton's files name each other


def use_kernel_caches() -> None:
    """Set the libraries' cache folders to those in ``HYLO_KERNEL_CACHE``. What the user has set stays.

    Triton then also keeps the tuning results of all kernels. fla always keeps those of its own.
    """
    if not os.environ.get(FOLDER):
        return
    folder = Path(os.environ[FOLDER]).expanduser().resolve()
    os.environ.setdefault(TUNING, "1")
    for variable, name in CACHES.items():
        os.environ.setdefault(variable, str(folder / name))
    follow_move(folder)


def follow_move(folder: Path) -> None:
    """Correct the absolute paths in Triton's cache after ``folder`` was copied from another place."""
    place, triton = folder / PLACE, folder / CACHES["TRITON_CACHE_DIR"]
    triton.mkdir(parents=True, exist_ok=True)
    if place.is_file() and place.read_text() == str(folder):
        return
    for group in triton.glob("*/__grp__*.json"):
        files = json.loads(group.read_text())["child_paths"]
        moved = {name: str(group.parent / Path(path).name) for name, path in files.items()}
        _write(group, json.dumps({"child_paths": moved}))
    _write(place, str(folder))


def _write(path: Path, text: str) -> None:
    """Write a file whole. Other ranks, runs and machines may read the file, or write the same."""
    with whole_file(path, shared=True) as scratch:
        scratch.write_text(text)


def prepare_kernels() -> None:
    """Prepare this process for compiling GPU kernels: cache folders, and few candidates, compiled on all cores.

    Call before Triton and fla are imported. Another version of Triton than the register lists tunes as ever.
    """
    use_kernel_caches()
    from hylo_megatron.engine.cpu import without_cuda

    version, wanted = installed_version("triton"), [patch for patch in patches("tuning") if patch.needed()]
    if version is None or without_cuda() or not wanted:
        return
    if all(lists(patch, version) for patch in wanted):
        install("tuning")
        return
    what = f"triton {version} compiles all candidates, on one core; expected {wanted[0].versioned()}"
    print(f"warning: {what}", file=sys.stderr, flush=True)
