"""The table of ``scaling.py``, as Markdown and JSON."""

from collections import defaultdict
from pathlib import Path

from hylo_megatron.files import write_json, write_text
from hylo_megatron.markdown import table
from hylo_megatron.planner.fit import RATES as FITTED_RATES
from hylo_megatron.planner.fit import MeasuredStep, fitted_to, mean_error
from hylo_megatron.planner.flops import RATES
from hylo_megatron.planner.speed import CARDS, FITTED
from hylo_megatron.planner.training import PlannedRun

HEAD = ["layout", "GPUs", "tokens/s", "to one", "of linear", "utilisation", "GiB", "planned GiB", "planned tokens/s",
        "sent in a step", "communication alone", "remark"]  # fmt: skip


def planned_rate(device: str, measured: float) -> float:
    """Return the rate of products that steps on ``device`` are planned with; an H100's for steps on a CPU.

    A card that ``RATES`` names is planned with the rate there, by which the planner's constants were fitted. One
    product ran at 728 to 795 TFLOP/s on cards of one name, and the speeds of whole steps did not follow it.
    """
    return CARDS["H100"] if device == "CPU" else RATES.get(device, measured)


def base_of(rows: list[dict]) -> dict | None:
    """Return the measured row on the fewest GPUs, to which the others are compared."""
    return min((row for row in rows if "failed" not in row), key=lambda row: row["devices"], default=None)


def compared(row: dict, base: dict | None) -> dict:
    """Add the ratios to ``base``, and by how much the plan is above what was measured, as a share."""
    if "failed" in row:
        return row
    ratio = row["tokens_per_second"] / base["tokens_per_second"]
    errors = {name: row["planned"][name] / row[name] - 1 for name in row["planned"] if row[name]}
    return row | {
        "compared_with": base["layout"], "ratio": ratio, "of_linear": ratio * base["devices"] / row["devices"],
        "planned_error": errors,
    }  # fmt: skip


def sent_by_kind(row: dict) -> dict[str, int]:
    found: dict[str, int] = defaultdict(int)
    for each in row["sent"]:
        found[each["collective"]] += each["bytes"]
    return dict(found)


def _bytes(count: float) -> str:
    for unit, name in ((1e9, "GB"), (1e6, "MB")):
        if count >= unit:
            return f"{count / unit:.3g} {name}"
    return f"{count / 1e3:.3g} KB"


def _planned(row: dict, name: str, digits: str) -> str:
    if name not in row["planned"]:
        return "–"
    error = row.get("planned_error", {}).get(name)
    return format(row["planned"][name], digits) + (f" ({error:+.0%})" if error is not None else "")


def cells(row: dict) -> list[str]:
    plans = [_planned(row, "memory_gib", ".1f"), _planned(row, "tokens_per_second", ",.0f")]
    if "failed" in row:
        remark = "; ".join(filter(None, [row["how"], row["failed"]])).replace("|", "/")
        return [row["layout"], str(row["devices"]), *["–"] * 5, *plans, "–", "–", remark]
    sent = ", ".join(f"{kind} {_bytes(count)}" for kind, count in sent_by_kind(row).items()) or "nothing"
    return [
        row["layout"], str(row["devices"]), f"{row['tokens_per_second']:,.0f}", f"{row['ratio']:.2f}",
        f"{row['of_linear']:.2f}", f"{row['utilization']:.0%}", f"{row['memory_gib']:.1f}", *plans, sent,
        f"{row['exposed_communication_ms']:,.0f} of {row['seconds'] * 1e3:,.0f} ms", row["how"],
    ]  # fmt: skip


def refitted(steps: list[MeasuredStep]) -> dict:
    """Return the planner's rates that fit the steps best, with the errors of the speed before and after."""
    fitted = fitted_to(steps)
    mean = {when: mean_error(steps, constants) for when, constants in (("before", FITTED), ("after", fitted))}
    rates = {name: {"now": getattr(FITTED, name), "fitted": getattr(fitted, name)} for name in FITTED_RATES}
    return {"rates": rates, "mean_error": mean, "steps": len(steps)}


def fit_line(fit: dict) -> str:
    rates = ", ".join(
        f"{name} {each['fitted']:.3g} (now {each['now']:.3g})" for name, each in fit["rates"].items()
        if each["fitted"] != each["now"]
    )  # fmt: skip
    errors = fit["mean_error"]
    return (f"Constants of planner/speed.py that fit these {fit['steps']} rows best: {rates or 'as they are'}."
            f" Mean error of the planned speed: {errors['before']:.0%}, with them {errors['after']:.0%}.")  # fmt: skip


def write_table(path: Path, head: dict, rows: list[dict], runs: dict[str, PlannedRun | None]) -> str:
    """Write ``path`` and its Markdown sister, and return the Markdown. ``runs``: planned runs by the rows' layouts."""
    base, fit = base_of(rows), None
    rows = [compared(row, base) for row in rows]
    card = planned_rate(head["device"], head["product_rate"])
    steps = [
        MeasuredStep(run=runs[row["layout"]], seconds=row["seconds"], card=card)
        for row in rows if runs.get(row["layout"])
    ]  # fmt: skip
    taught = f", teacher {head['teacher']}" if "teacher" in head else ""
    lines = [f"{head['name']}{taught}, {head['device']}, products at {head['product_rate'] / 1e12:.0f} TFLOP/s", ""]
    lines.append(table([HEAD, *map(cells, rows)]))
    if base and base["devices"] > 1:
        lines += ["", f"No row on one GPU: ratios are to {base['layout']}."]
    if steps:
        fit = refitted(steps)
        lines += ["", fit_line(fit)]
    write_json(path, head | {"rows": rows, "fit": fit})
    write_text(path.with_suffix(".md"), "\n".join(lines) + "\n")
    return "\n".join(lines)
