#!/usr/bin/env python3
"""``hylo doctor`` for a clone in which nothing is installed."""

import os
import sys
from pathlib import Path

if __name__ == "__main__":
    root = str(Path(__file__).resolve().parent.parent)
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [root, os.environ.get("PYTHONPATH")]))
    os.execv(sys.executable, [sys.executable, "-m", "hylo_megatron", "doctor", *sys.argv[1:]])
