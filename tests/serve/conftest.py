"""These tests need vLLM and have an environment of their own: ``make test-serve``."""

from importlib.util import find_spec

if find_spec("vllm") is None:
    collect_ignore_glob = ["test_[!g]*.py"]  # test_geometry.py needs no vLLM
