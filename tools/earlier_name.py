#!/usr/bin/env python3
"""The commands of ``hylo`` under their earlier names: other scripts of this folder are links to this one."""

import sys
from pathlib import Path

from hylo_megatron.cli import run

RENAMED = {"convert-amd-hylo": "convert-amd", "convert-hf-to-megatron": "convert", "convert-megatron-to-hf": "export",
           "plan-memory": "plan"}  # fmt: skip


def command_of(script: str) -> str:
    """Return the command that the script at this path stands for."""
    name = Path(script).stem.replace("_", "-")
    return RENAMED.get(name, name)


if __name__ == "__main__":
    run(command_of(sys.argv[0]))
