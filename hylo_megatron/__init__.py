"""Upcycles Transformers into hybrids of MLA and Gated DeltaNet or Mamba-2 layers.

``import hylo_megatron`` registers the hybrid (``model_type: hylo``) with transformers' auto classes, and so imports
transformers. The programs of this package do without: each registers the hybrid where it loads one. So does a process
with ``HYLO_REGISTER=0`` in its environment.
"""

import importlib.util
import os
import sys
from pathlib import Path

if sys.version_info < (3, 11):  # noqa: UP036 - the other modules have syntax that an older Python cannot read
    raise SystemExit(
        f"error: hylo_megatron needs Python 3.11 or newer, {sys.executable} is {sys.version.split()[0]}: activate the"
        " environment that has it (after `make env`: source .venv/bin/activate)"
    )

STARTED_BY = os.getppid()  # as early as possible: see parent.py


def _is_own_program() -> bool:
    """Return whether this process runs a program of this package or of its repository."""
    if os.environ.get("HYLO_REGISTER") == "0" or "HYLO_PARENT" in os.environ:  # started by a program of this package
        return True
    package = Path(__file__).resolve().parent
    program = Path(sys.argv[0] if sys.argv else "").absolute()
    if program.name == "-m":  # of python: the module that it is going to run is not in sys.argv yet
        words = sys.orig_argv
        return words[words.index("-m") + 1].partition(".")[0] == package.name
    folders = [package, *(package.parent / name for name in ("tools", "examples", "tests"))]
    command = program.name.partition(" ")[0]
    return command in ("hylo", "hylo-doctor") or any(program.is_relative_to(folder) for folder in folders)


if not _is_own_program() and importlib.util.find_spec("transformers") and importlib.util.find_spec("torch"):
    from hylo_megatron.hf import register

    register()
