"""These tests need vLLM and have an environment of their own: ``make test-serve``."""

import sys
from importlib.util import find_spec

from helpers.paths import ROOT

sys.path.insert(0, str(ROOT / "tools"))

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_[!g]*.py"]  # test_geometry.py needs no vLLM
