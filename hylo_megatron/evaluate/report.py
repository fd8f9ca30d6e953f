"""What an evaluation leaves on disk: ``evaluation.json``, ``evaluation.md`` and the pictures."""

import json
import os
from collections import Counter
from pathlib import Path

from hylo_megatron.evaluate.plots import heat_map, loss_curves

ROLES = ("teacher", "model")
TEXTS = ("prose", "code")


def ratios_of(teacher: dict, model: dict) -> dict:
    """The model's figures over the teacher's: cache, and perplexities where both read the same tokens."""
    ratios = {}
    if teacher["kv_cache_bytes_per_token"]:
        ratios["kv_cache"] = model["kv_cache_bytes_per_token"] / teacher["kv_cache_bytes_per_token"]
    for text in TEXTS:
        pair = [entry.get("perplexity", {}).get(text) for entry in (teacher, model)]
        if all(pair) and pair[0]["tokens"] == pair[1]["tokens"] and teacher["vocabulary"] == model["vocabulary"]:
            ratios[f"perplexity_{text}"] = pair[1]["perplexity"] / pair[0]["perplexity"]
    return ratios


def accuracy_by_length(needle: dict) -> dict[int, tuple[int, int]]:
    """(hits, samples) of every prompt length."""
    totals: dict[int, tuple[int, int]] = {}
    for cell in needle["cells"]:
        hits, samples = totals.get(cell["length"], (0, 0))
        totals[cell["length"]] = (hits + cell["hits"], samples + cell["samples"])
    return totals


def _row(label: str, entries: list[dict], show, ratio: str = "") -> list[str]:
    """A table row; a figure that a model lacks is shown as a dash."""
    values = []
    for entry in entries:
        try:
            values.append(show(entry))
        except KeyError:
            values.append("–")
    return [label, *values, ratio]


def comparison_rows(report: dict) -> list[list[str]]:
    """Header and rows of the main table, teacher first; the last column is the ratio (empty without a teacher)."""
    entries = [report[role] for role in ROLES if report.get(role)]
    ratios = report.get("ratios", {})
    shown = {name: f"{100 * value:.1f} %" if name == "kv_cache" else f"{value:.3f}" for name, value in ratios.items()}
    rows = [
        ["", *("teacher" if role == "teacher" else "model" for role in ROLES if report.get(role)), "ratio"],
        _row("name", entries, lambda entry: entry["name"]),
        _row("layers", entries, lambda entry: _plan_text(entry["plan"])),
        _row("parameters", entries, lambda entry: f"{entry['parameters'] / 1e6:,.1f} M"),
        _row(
            "cache, bytes a token (bf16)",
            entries,
            lambda entry: f"{entry['kv_cache_bytes_per_token']:,}",
            shown.get("kv_cache", ""),
        ),
    ]
    for text in TEXTS:
        if any(text in entry.get("perplexity", {}) for entry in entries):
            show = lambda entry, text=text: f"{entry['perplexity'][text]['perplexity']:.3f}"  # noqa: E731
            rows.append(_row(f"perplexity, {text}", entries, show, shown.get(f"perplexity_{text}", "")))
    for length in sorted({n for entry in entries if "needle" in entry for n in accuracy_by_length(entry["needle"])}):

        def show_hits(entry: dict, length: int = length) -> str:
            hits, samples = accuracy_by_length(entry["needle"])[length]
            return f"{100 * hits / samples:.0f} % ({hits}/{samples})"

        rows.append(_row(f"needle, {length:,} tokens", entries, show_hits))
    return rows if ratios else [row[:-1] for row in rows]


def position_rows(report: dict, text: str) -> list[list[str]]:
    """Loss (nats a token) by position in the document, one column per model; empty if nothing was measured."""
    measured = {
        role: report[role]["perplexity"][text]["by_position"]
        for role in ROLES
        if text in (report.get(role) or {}).get("perplexity", {})
    }
    if not measured:
        return []
    buckets = sorted({(row["from"], row["to"]) for rows in measured.values() for row in rows})
    table = [["position", *measured]]
    for start, end in buckets:
        by_model = [
            next((f"{row['loss']:.3f}" for row in rows if (row["from"], row["to"]) == (start, end)), "–")
            for rows in measured.values()
        ]
        table.append([f"{start:,}–{end - 1:,}", *by_model])
    return table


def _plan_text(plan: list[str]) -> str:
    return " + ".join(f"{count} {kind}" for kind, count in Counter(plan).items())


def _table(rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    return "\n".join([lines[0], "|" + "---|" * len(rows[0]), *lines[1:]])


def markdown(report: dict) -> str:
    """The report as Markdown; pictures are linked by file name."""
    settings, parts = report["settings"], ["# Evaluation", _table(comparison_rows(report))]
    parts.append(
        f"Documents cut to {settings['context']:,} tokens, first token not scored; seed {settings['seed']}; "
        f"{report['dtype']} on {report['device']}; torch {report['versions']['torch']}, "
        f"transformers {report['versions']['transformers']}."
    )
    for text in TEXTS:
        if rows := position_rows(report, text):
            tokens = next(
                report[role]["perplexity"][text]["tokens"]
                for role in reversed(ROLES)
                if text in (report.get(role) or {}).get("perplexity", {})
            )
            parts += [f"## Loss by position, {text}", f"Nats a token, {tokens:,} tokens.", _table(rows)]
    for title, name in (("Needle retrieval", "heat_map"), ("Training loss", "loss_curves")):
        if name in report.get("files", {}):
            parts += [f"## {title}", f"![{title}]({report['files'][name]})"]
    return "\n\n".join(parts) + "\n"


def write_text(path: Path, text: str) -> None:
    """Replaces a file in one step, so that a reader never sees half of it."""
    scratch = path.with_name(path.name + ".partial")
    scratch.write_text(text, encoding="utf-8")
    os.replace(scratch, path)


def write_report(report: dict, out: Path, curves=()) -> dict:
    """Writes figures first, then pictures and table; returns the report with the names of its ``files``."""
    files = {"json": "evaluation.json"}
    write_text(out / files["json"], json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False))
    cells = {
        f"{role}: {report[role]['name']}": report[role]["needle"]["cells"]
        for role in ROLES
        if "needle" in (report.get(role) or {})
    }
    if cells:
        files["heat_map"] = heat_map(cells, out / "needle.png").name
    if curves and (picture := loss_curves(curves, out / "loss_curves.png")):
        files["loss_curves"] = picture.name
    files["markdown"] = "evaluation.md"
    report = {**report, "files": files}
    write_text(out / files["markdown"], markdown(report))
    write_text(out / files["json"], json.dumps(report, indent=1, ensure_ascii=False, allow_nan=False))
    return report
