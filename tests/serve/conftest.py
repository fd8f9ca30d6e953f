"""These tests need vLLM and have an environment of their own: ``make test-serve``."""

import sys
from importlib.util import find_spec
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "tools"))

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_*.py"]
