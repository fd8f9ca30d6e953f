"""Blocks of a report, and their two forms: Markdown, and one HTML page with everything inside."""

import base64
from dataclasses import dataclass
from html import escape
from pathlib import Path

from hylo_megatron.markdown import table


@dataclass(frozen=True)
class Heading:
    text: str
    level: int


@dataclass(frozen=True)
class Paragraph:
    text: str


@dataclass(frozen=True)
class Table:
    """Rows of text, the header first. The first column has the rows' names."""

    rows: list[list[str]]


@dataclass(frozen=True)
class Picture:
    """A PNG file, by its name in the report's folder."""

    title: str
    file: str


Block = Heading | Paragraph | Table | Picture

# Below 45 em a table has no room: each row becomes a list, and each cell names its column.
CSS = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #ffffff; --line: #d5d5d5; --soft: #f4f4f4; --dim: #5c5c5c; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e6e6; --paper: #16181b; --line: #3a3d42; --soft: #202327; --dim: #a5a5a5; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1rem; max-width: 76rem; background: var(--paper); color: var(--ink);
  font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1, h2 { line-height: 1.2; margin: 1.6em 0 .6em; }
h1 { font-size: 1.7rem; } h2 { font-size: 1.25rem; }
p { color: var(--dim); max-width: 60rem; }
img { display: block; max-width: 100%; height: auto; background: #fff; border-radius: .4rem; padding: .4rem; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: .92rem; }
th, td { text-align: left; padding: .35rem .6rem; border-bottom: 1px solid var(--line); vertical-align: top; }
thead th { background: var(--soft); }
tbody th { font-weight: 600; }
@media (max-width: 45em) {
  thead { display: none; }
  table, tbody, tr, th, td { display: block; width: 100%; }
  tr { border: 1px solid var(--line); border-radius: .4rem; margin-bottom: .7rem; overflow: hidden; }
  th, td { border: 0; }
  tbody th { background: var(--soft); }
  td { display: flex; justify-content: space-between; gap: 1rem; }
  td::before { content: attr(data-column); color: var(--dim); flex: none; max-width: 45%; }
  td:empty { display: none; }
}
"""


def markdown(blocks: list[Block]) -> str:
    """Return Markdown; pictures are linked by file name."""
    return "\n\n".join(map(_in_markdown, blocks)) + "\n"


def _in_markdown(block: Block) -> str:
    match block:
        case Heading(text, level):
            return f"{'#' * level} {text}"
        case Table(rows):
            return table(rows)
        case Picture(title, file):
            return f"![{title}]({file})"
    return block.text


def html(blocks: list[Block], folder: Path) -> str:
    """Return a page that needs no other file and no script; pictures of ``folder`` are part of the page."""
    title = escape(next(block.text for block in blocks if isinstance(block, Heading)))
    body = "\n".join(_in_html(block, folder) for block in blocks)
    return (
        f'<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1">\n<style>{CSS}</style>\n</head>\n'
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _in_html(block: Block, folder: Path) -> str:
    match block:
        case Heading(text, level):
            return f"<h{level}>{escape(text)}</h{level}>"
        case Table(rows):
            return _table(rows)
        case Picture(title, file):
            data = base64.b64encode((folder / file).read_bytes()).decode()
            return f'<img alt="{escape(title)}" src="data:image/png;base64,{data}">'
    return f"<p>{escape(block.text)}</p>"


def _table(rows: list[list[str]]) -> str:
    header, *body = [[escape(cell) for cell in row] for row in rows]
    head = "".join(f'<th scope="col">{cell}</th>' for cell in header)
    lines = []
    for first, *others in body:
        cells = zip(header[1:], others, strict=True)
        values = "".join(f'<td data-column="{column}">{cell}</td>' for column, cell in cells)
        lines.append(f'<tr><th scope="row">{first}</th>{values}</tr>')
    return f"<table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n" + "\n".join(lines) + "\n</tbody>\n</table>"
