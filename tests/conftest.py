"""Environment of every test, set before anything imports torch."""

import os

import pytest
from hypothesis import HealthCheck, settings

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several ranks share the cores; spinning threads starve each other
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# On a busy machine an example, or the making of one, may take any time. Every run has the same examples.
settings.register_profile(
    "repository", deadline=None, derandomize=True, suppress_health_check=[HealthCheck.too_slow]
)  # fmt: skip
settings.load_profile("repository")


def pytest_addoption(parser):
    parser.addoption("--rewrite-golden", action="store_true", help="write the golden losses of tests/golden again")


FIRST = ("e2e", "golden", "checkpoint", "parallel", "distill")  # rooms with few tests, most of which start processes


def pytest_collection_modifyitems(items):
    """Put the longest files first, so that no worker still has one when the other has run out of files."""
    rooms = {room: place for place, room in enumerate(FIRST)}
    items.sort(key=lambda item: rooms.get(item.path.parent.name, len(FIRST)))


@pytest.fixture(scope="module", autouse=True)
def no_process_groups_left():
    """Fail a file that leaves process groups to the files after it: which those are depends on the worker."""
    from helpers import groups

    yield
    if groups.left_behind():
        groups.end()
        pytest.fail("a test left torch.distributed initialised; take the fixture process_groups")


@pytest.fixture(scope="module")
def process_groups(no_process_groups_left):
    """Process groups of one rank, for the tests of one file."""
    from helpers import groups

    with groups.one_rank():
        yield
