"""Files of an evaluation: JSON, and its tables and pictures as Markdown and as one self-contained HTML page."""

from pathlib import Path

from hylo_megatron.evaluate.compare import ROLES
from hylo_megatron.evaluate.page import Block, Heading, Paragraph, Picture, Table, html, markdown
from hylo_megatron.evaluate.plots import heat_map, loss_curves, position_curves
from hylo_megatron.evaluate.tables import by_position, comparison_rows, entries_of, position_rows
from hylo_megatron.files import write_json, write_text

PICTURES = {"heat_map": "Needle retrieval", "loss_by_position": "Loss by position", "loss_curves": "Training loss"}


def blocks(report: dict) -> list[Block]:
    """Return the whole report, from top to bottom."""
    settings, files, versions = report["settings"], report.get("files", {}), report["versions"]
    found: list[Block] = [
        Heading("Evaluation", 1),
        Table(comparison_rows(report)),
        Paragraph(
            f"Documents cut to {settings['context']:,} tokens, first token not scored. Perplexities: 95 % interval "
            "over documents. Scores: accuracy in percent (right/samples; 95 % interval). Comparisons: ratios of "
            "perplexities on the same documents, and differences of scores in points on the same questions, each "
            f"with an interval of its own. Seed {settings['seed']}; {report['dtype']} on {report['device']}; torch "
            f"{versions['torch']}, transformers {versions['transformers']}."
        ),
    ]
    for name, title in PICTURES.items():
        if name in files:
            found += [Heading(title, 2), Picture(title, files[name])]
    for title, by_role in by_position(report).items():
        last = list(by_role.values())[-1]
        counted = f"Nats a token, {last['tokens']:,} tokens of {last['documents']:,} documents."
        found += [Heading(f"Loss by position, {title}", 2), Paragraph(counted), Table(position_rows(by_role))]
    return found


def draw(report: dict, out: Path, curves=()) -> dict[str, str]:
    """Draw the pictures that the report has figures for. Returns their file names."""
    files, entries = {}, entries_of(report)
    cells = {f"{ROLES[role]}: {e['name']}": e["needle"]["cells"] for role, e in entries.items() if "needle" in e}
    if cells:
        files["heat_map"] = heat_map(cells, out / "needle.png").name
    if positions := by_position(report):
        files["loss_by_position"] = position_curves(positions, out / "loss_by_position.png").name
    if curves and (picture := loss_curves(curves, out / "loss_curves.png")):
        files["loss_curves"] = picture.name
    return files


def write_report(report: dict, out: Path, curves=()) -> dict:
    """Write figures first, then pictures, Markdown and HTML. Returns the report with the names of its ``files``."""
    files = {"json": "evaluation.json"}
    write_json(out / files["json"], report, ensure_ascii=False, allow_nan=False)
    files |= draw(report, out, curves)
    files |= {"markdown": "evaluation.md", "html": "evaluation.html"}
    report = {**report, "files": files}
    write_text(out / files["markdown"], markdown(blocks(report)))
    write_text(out / files["html"], html(blocks(report), out))
    write_json(out / files["json"], report, ensure_ascii=False, allow_nan=False)
    return report
