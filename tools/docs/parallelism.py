"""Write the tables of docs/parallelism.md again: bytes sent under context parallelism, and parity with one process.

``PYTHONPATH=.:tests python tools/docs/parallelism.py [--parity REPORT.xml]``

The bytes come from formulas that a test compares with a count. The parity comes from a report of
tests/parallel/test_parallel_parity.py (``pytest --junitxml=REPORT.xml``); without one that table stays as it is.
"""

import argparse
import json
import re
import xml.etree.ElementTree as ElementTree
from pathlib import Path

from helpers import cp_bytes, parity_table
from helpers.paths import DOCS

PAGE = DOCS / "parallelism.md"
PARITY = "loss / gradient, fp32 / gradient, fp64 / five steps"


def measured(report: Path) -> parity_table.Measured:
    """Return the relative differences that the tests of a report have recorded."""
    found = ElementTree.parse(report).iterfind(".//property[@name='parity']")
    return {(layout, what): gaps for layout, what, gaps in (json.loads(one.get("value")) for one in found)}


def replaced(page: str, name: str, table: str) -> str:
    """Return ``page`` with the table between the comments NAME:begin and NAME:end exchanged."""
    pattern = re.compile(rf"(?<=<!-- {name}:begin -->\n).*?(?=\n<!-- {name}:end -->)", re.S)
    return pattern.sub(lambda _: table, page)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parity", type=Path, help="report of the parity tests, JUnit XML")
    args = parser.parse_args()
    page = replaced(PAGE.read_text(), "cp-bytes", cp_bytes.table())
    if args.parity:
        page = replaced(page, "parity", parity_table.table(measured(args.parity), PARITY))
    PAGE.write_text(page)


if __name__ == "__main__":
    main()
