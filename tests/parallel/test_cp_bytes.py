"""What context parallelism sends is what its formulas say, and the docs have the table that the formulas give."""

import json

import pytest
from helpers import cp_bytes
from helpers import train as helpers
from helpers.paths import DOCS, PROGRAMS

from hylo_megatron.packages import has


@pytest.mark.skipif(not has("megatron-core"), reason="megatron-core is not installed")
@pytest.mark.parametrize("ranks", [2, 4])
def test_every_choice_sends_what_its_formula_says(ranks):
    run = helpers.torchrun(PROGRAMS / "cp_bytes.py", processes=ranks)
    assert run.returncode == 0, run.stderr[-3000:]
    lines = [json.loads(line) for line in run.stdout.splitlines() if line.startswith("{")]
    assert len(lines) == len(cp_bytes.FORMULAS)
    assert not [line for line in lines if line["sent"] != line["formula"]]


def test_the_docs_have_the_table():
    """After a change of the formulas: ``make docs-tables``."""
    assert (
        f"<!-- cp-bytes:begin -->\n{cp_bytes.table()}\n<!-- cp-bytes:end -->" in (DOCS / "parallelism.md").read_text()
    )
