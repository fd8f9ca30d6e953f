"""Relative differences between a parallel layout and one process, as a Markdown table."""

Measured = dict[tuple[str, str], list[float | None]]  # by layout and by what was trained


def table(measured: Measured, head: str) -> str:
    """Return a row for each layout. ``head`` says what the numbers of a cell are."""
    layouts, columns = (list(dict.fromkeys(key[place] for key in measured)) for place in (0, 1))
    lines = [f"| {head} | " + " | ".join(columns) + " |", "|---|" + "---|" * len(columns)]
    for layout in layouts:
        cells = [measured.get((layout, column)) for column in columns]
        texts = [" / ".join("–" if x is None else f"{x:.0e}" for x in cell) if cell else "" for cell in cells]
        lines.append(f"| {layout} | " + " | ".join(texts) + " |")
    return "\n".join(lines)
