"""Converted tiny teachers for all tests of the initialisation."""

import pytest
from helpers.bases import Bases


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    return Bases(tmp_path_factory.mktemp("bases"))
