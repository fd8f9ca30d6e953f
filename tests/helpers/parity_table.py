"""The parity matrix as a table: filled by test_parallel_parity.py, printed at the end, kept in docs/parallelism.md."""

from helpers.paths import DOCS

MEASURED: dict[tuple[str, str], tuple] = {}  # (layout, what): see HEAD
DOCUMENT = DOCS / "parallelism.md"
HEAD = "loss / gradient, fp32 / gradient, fp64 / five steps"
BEGIN, END = "<!-- parity:begin -->", "<!-- parity:end -->"


def table() -> str:
    layouts, columns = (list(dict.fromkeys(key[place] for key in MEASURED)) for place in (0, 1))
    lines = [f"| {HEAD} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for layout in layouts:
        cells = [MEASURED.get((layout, column)) for column in columns]
        texts = [" / ".join("–" if x is None else f"{x:.0e}" for x in cell) if cell else "" for cell in cells]
        lines.append(f"| {layout} | " + " | ".join(texts) + " |")
    return "\n".join(lines)


def write() -> None:
    before, rest = DOCUMENT.read_text().split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + "\n" + table() + "\n" + END + rest.split(END)[1])
