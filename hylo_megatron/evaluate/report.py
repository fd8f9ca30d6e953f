"""Files of an evaluation: ``evaluation.json``, ``evaluation.md`` and the pictures."""

from collections import Counter
from pathlib import Path

from hylo_megatron.evaluate.plots import heat_map, loss_curves, position_curves
from hylo_megatron.files import write_json, write_text
from hylo_megatron.markdown import table

ROLES = ("teacher", "model")
TEXTS = ("prose", "book", "code", "c")  # kinds of text with a perplexity
PICTURES = {"heat_map": "Needle retrieval", "loss_by_position": "Loss by position", "loss_curves": "Training loss"}
TITLES = {"prose": "prose", "book": "books", "code": "code", "c": "C", "long": "long documents"}


def losses_of(figures: dict) -> dict[str, dict]:
    """Return all results of one model that have a loss per token: those of its texts and of long documents."""
    return figures.get("perplexity", {}) | ({"long": figures["long"]} if "long" in figures else {})


def ratios_of(teacher: dict, model: dict) -> dict:
    """Return the model's figures divided by the teacher's: cache, and perplexities if both read the same tokens."""
    ratios = {}
    if teacher["kv_cache_bytes_per_token"]:
        ratios["kv_cache"] = model["kv_cache_bytes_per_token"] / teacher["kv_cache_bytes_per_token"]
    if teacher["vocabulary"] == model["vocabulary"]:
        before = losses_of(teacher)
        for text, after in losses_of(model).items():
            if text in before and before[text]["tokens"] == after["tokens"]:
                ratios[f"perplexity_{text}"] = after["perplexity"] / before[text]["perplexity"]
    return ratios


def needle_cell(figures: dict, length: int) -> str:
    """Return the accuracy at one prompt length with its 95 % interval, in percent."""
    if length in figures["needle"].get("not_run", ()):
        return "not run"
    row = {row["length"]: row for row in figures["needle"]["by_length"]}[length]
    accuracy, low, high = (f"{100 * row[name]:.0f}" for name in ("accuracy", "low", "high"))
    return f"{accuracy} % ({row['hits']}/{row['samples']}; {low}–{high})"


def _row(label: str, entries: list[dict], show, ratio: str = "") -> list[str]:
    """Return a table row; a figure that a model lacks is a dash."""
    values = []
    for entry in entries:
        try:
            values.append(show(entry))
        except KeyError:
            values.append("–")
    return [label, *values, ratio]


def comparison_rows(report: dict) -> list[list[str]]:
    """Return header and rows of the main table, teacher first.

    The last column is the ratio (empty without a teacher).
    """
    entries = [report[role] for role in ROLES if report.get(role)]
    ratios = report.get("ratios", {})
    shown = {name: f"{100 * value:.1f} %" if name == "kv_cache" else f"{value:.3f}" for name, value in ratios.items()}
    rows = [
        ["", *(role for role in ROLES if report.get(role)), "ratio"],
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
    for text, title in TITLES.items():
        if any(text in losses_of(entry) for entry in entries):
            show = lambda entry, text=text: f"{losses_of(entry)[text]['perplexity']:.3f}"  # noqa: E731
            rows.append(_row(f"perplexity, {title}", entries, show, shown.get(f"perplexity_{text}", "")))
    for length in sorted({row["length"] for entry in entries for row in entry.get("needle", {}).get("by_length", ())}):
        show = lambda entry, length=length: needle_cell(entry, length)  # noqa: E731
        rows.append(_row(f"needle, {length:,} tokens", entries, show))
    return rows if ratios else [row[:-1] for row in rows]


def by_position(report: dict) -> dict[str, dict[str, dict]]:
    """Return for each text, by title, the result of each model, by role."""
    measured = {role: losses_of(report[role]) for role in ROLES if report.get(role)}
    return {
        title: {role: results[text] for role, results in measured.items() if text in results}
        for text, title in TITLES.items()
        if any(text in results for results in measured.values())
    }


def position_rows(by_role: dict[str, dict]) -> list[list[str]]:
    """Return header and rows of a table of losses, one column per model; a bucket that a model lacks is a dash."""
    losses = {
        role: {(row["from"], row["to"]): row["loss"] for row in result["by_position"]}
        for role, result in by_role.items()
    }
    table = [["position", *losses]]
    for start, end in sorted(set().union(*losses.values())):
        found = (rows.get((start, end)) for rows in losses.values())
        table.append([f"{start:,}–{end - 1:,}", *("–" if loss is None else f"{loss:.3f}" for loss in found)])
    return table


def _plan_text(plan: list[str]) -> str:
    return " + ".join(f"{count} {kind}" for kind, count in Counter(plan).items())


def markdown(report: dict) -> str:
    """Return the report as Markdown; pictures are linked by file name."""
    settings, files, versions = report["settings"], report.get("files", {}), report["versions"]
    parts = [
        "# Evaluation",
        table(comparison_rows(report)),
        f"Documents cut to {settings['context']:,} tokens, first token not scored. Needles: accuracy in percent "
        f"(found/prompts; 95 % interval). Seed {settings['seed']}; {report['dtype']} on {report['device']}; "
        f"torch {versions['torch']}, transformers {versions['transformers']}.",
        *(f"## {title}\n\n![{title}]({files[name]})" for name, title in PICTURES.items() if name in files),
    ]
    for title, by_role in by_position(report).items():
        last = list(by_role.values())[-1]
        counted = f"Nats a token, {last['tokens']:,} tokens of {last['documents']:,} documents."
        parts += [f"## Loss by position, {title}", counted, table(position_rows(by_role))]
    return "\n\n".join(parts) + "\n"


def write_report(report: dict, out: Path, curves=()) -> dict:
    """Write figures first, then pictures and table. Returns the report with the names of its ``files``."""
    files = {"json": "evaluation.json"}
    write_json(out / files["json"], report, ensure_ascii=False, allow_nan=False)
    cells = {
        f"{role}: {report[role]['name']}": report[role]["needle"]["cells"]
        for role in ROLES
        if "needle" in (report.get(role) or {})
    }
    if cells:
        files["heat_map"] = heat_map(cells, out / "needle.png").name
    if positions := by_position(report):
        files["loss_by_position"] = position_curves(positions, out / "loss_by_position.png").name
    if curves and (picture := loss_curves(curves, out / "loss_curves.png")):
        files["loss_curves"] = picture.name
    files["markdown"] = "evaluation.md"
    report = {**report, "files": files}
    write_text(out / files["markdown"], markdown(report))
    write_json(out / files["json"], report, ensure_ascii=False, allow_nan=False)
    return report
