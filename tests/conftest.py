"""Environment of every test, set before anything imports torch."""

import os
import sys

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share the cores; spinning threads starve each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def pytest_addoption(parser):
    parser.addoption("--rewrite-golden", action="store_true", help="write the golden losses of tests/golden again")


def pytest_terminal_summary(terminalreporter):
    parity = sys.modules.get("helpers.parity_table")
    if parity and parity.MEASURED:
        terminalreporter.section("parallel layouts against one process: largest relative difference")
        terminalreporter.write_line(parity.table())
        if os.environ.get("HYLO_WRITE_PARITY"):
            parity.write()
