"""Tables of a report, as rows of text; ``report.py`` puts them into Markdown and HTML."""

from collections import Counter

from hylo_megatron.evaluate.compare import ROLES, losses_of, rows_of
from hylo_megatron.evaluate.suites import Row

TITLES = {"prose": "prose", "book": "books", "code": "code", "c": "C", "long": "long documents"}
NONE = "–"
Rows = list[list[str]]


def entries_of(report: dict) -> dict[str, dict]:
    """Return the figures of every measured model, by role, the teacher first."""
    return {role: report[role] for role in ROLES if report.get(role)}


def plan_text(plan: list[str]) -> str:
    return " + ".join(f"{count} {kind}" for kind, count in Counter(plan).items())


def perplexity_cell(result: dict) -> str:
    """Return a perplexity with its 95 % interval over documents, if it has one."""
    found = f"{result['perplexity']:.3f}" if result["perplexity"] < 1e6 else f"{result['perplexity']:.2e}"
    if not result.get("low", 0) < result.get("high", 0):
        return found
    low, high = (f"{value:.2f}" if value < 1e6 else f"{value:.1e}" for value in (result["low"], result["high"]))
    return f"{found} ({low}–{high})"


def score_cell(row: dict) -> str:
    """Return an accuracy with its 95 % interval, in percent. Equal scores other than hits have no interval."""
    accuracy, low, high = (f"{100 * row[name]:.0f}" for name in ("accuracy", "low", "high"))
    spread = f"; {low}–{high}" if row["low"] < row["high"] else ""
    return f"{accuracy} % ({row['hits']:g}/{row['samples']}{spread})"


def ratio_cell(found: dict | None, percent: bool = False) -> str:
    """Return a ratio with its 95 % interval, if it has one; empty if the ratio was not measured."""
    if found is None:
        return ""
    if percent:
        return f"{100 * found['ratio']:.1f} %"
    spread = f" ({found['low']:.3f}–{found['high']:.3f})" if "low" in found else ""
    return f"{found['ratio']:.3f}{spread}"


def _described(entries: dict[str, dict], compared: dict[str, dict]) -> Rows:
    shown = {
        "name": lambda entry: entry["name"] + (f", YaRN × {entry['yarn']:g}" if "yarn" in entry else ""),
        "layers": lambda entry: plan_text(entry["plan"]),
        "parameters": lambda entry: f"{entry['parameters'] / 1e6:,.1f} M",
    }
    rows = [[label, *map(show, entries.values()), *("" for _ in compared)] for label, show in shown.items()]
    cache = [f"{entry['kv_cache_bytes_per_token']:,}" for entry in entries.values()]
    ratios = [ratio_cell(found.get("kv_cache"), percent=True) for found in compared.values()]
    rows.append(["cache, bytes a token (bf16)", *cache, *ratios])
    windows = [entry.get("window_cache_bytes", 0) for entry in entries.values()]
    if any(windows):
        blank = ("" for _ in compared)
        rows.append(["cache of windows, bytes a request (bf16)", *(f"{size:,}" for size in windows), *blank])
    return rows


def _perplexities(entries: dict[str, dict], compared: dict[str, dict]) -> Rows:
    losses, rows = [losses_of(entry) for entry in entries.values()], []
    for text, title in TITLES.items():
        if any(text in found for found in losses):
            cells = [perplexity_cell(found[text]) if text in found else NONE for found in losses]
            ratios = [ratio_cell(found.get(f"perplexity_{text}")) for found in compared.values()]
            rows.append([f"perplexity, {title}", *cells, *ratios])
    return rows


def _scores(entries: dict[str, dict], differences: dict[str, dict]) -> Rows:
    """Return a row for each score; columns of comparison have the difference in points."""
    found = [rows_of(entry) for entry in entries.values()]
    return [
        [
            label,
            *(_shown(rows.get(label)) for rows in found),
            *(difference_cell(by_label.get(label)) for by_label in differences.values()),
        ]
        for label in dict.fromkeys(label for rows in found for label in rows)
    ]


def _shown(row: Row | None) -> str:
    if row is None:
        return NONE
    return score_cell(row.summary) if row.summary else "not run"


def difference_cell(found: dict | None) -> str:
    """Return a difference in points with its 95 % interval, if it has one; empty if it was not measured."""
    if found is None:
        return ""
    spread = f" ({100 * found['low']:+.1f} to {100 * found['high']:+.1f})" if "low" in found else ""
    return f"{100 * found['difference']:+.1f} points{spread}"


def comparison_rows(report: dict) -> Rows:
    """Return header and rows of the main table: a column for each model, then ratios to teacher and control."""
    entries, compared = entries_of(report), report.get("compared_with", {})
    header = ["", *(ROLES[role] for role in entries), *(f"model / {base}" for base in compared)]
    rows = [*_described(entries, compared), *_perplexities(entries, compared)]
    return [header, *rows, *_scores(entries, report.get("differences", {}))]


def by_position(report: dict) -> dict[str, dict[str, dict]]:
    """Return for each text, by title, the result of each model, by role."""
    measured = {ROLES[role]: losses_of(entry) for role, entry in entries_of(report).items()}
    return {
        title: {role: results[text] for role, results in measured.items() if text in results}
        for text, title in TITLES.items()
        if any(text in results for results in measured.values())
    }


def position_rows(by_role: dict[str, dict]) -> Rows:
    """Return header and rows of a table of losses, one column per model; a bucket that a model lacks is a dash."""
    losses = {
        role: {(row["from"], row["to"]): _loss_cell(row) for row in result["by_position"]}
        for role, result in by_role.items()
    }
    return [
        ["position", *losses],
        *(
            [f"{start:,}–{end - 1:,}", *(rows.get((start, end), NONE) for rows in losses.values())]
            for start, end in sorted(set().union(*losses.values()))
        ),
    ]


def _loss_cell(row: dict) -> str:
    spread = f" ({row['low']:.2f}–{row['high']:.2f})" if row.get("low", 0) < row.get("high", 0) else ""
    return f"{row['loss']:.3f}{spread}"
