"""The pictures of a report: needle heat maps side by side, loss by position, and training loss curves."""

import json
from collections.abc import Sequence
from itertools import product
from pathlib import Path

from hylo_megatron.errors import HyLoError
from hylo_megatron.files import whole_file

# colours of Okabe and Ito, which colour-blind people can tell apart
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
SMOOTH_FROM = 40  # points; longer curves are drawn as a running mean over a twentieth of them


def new_figure(width: float, height: float):
    """Return a figure that needs no display; sizes in inches."""
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise HyLoError("matplotlib is needed for the report's pictures: pip install matplotlib") from error
    return Figure(figsize=(width, height), layout="constrained")


def save(figure, path: Path) -> Path:
    with whole_file(path) as scratch:
        figure.savefig(scratch, dpi=150, format=path.suffix[1:])
    return path


def heat_map(cells_by_model: dict[str, list[dict]], path: str | Path) -> Path:
    """Draw needle accuracy in percent: a panel per model, depth down, length across, a dash where none was run."""
    lengths = sorted({cell["length"] for cells in cells_by_model.values() for cell in cells})
    depths = sorted({cell["depth"] for cells in cells_by_model.values() for cell in cells})
    width, height = max(2.6, 0.7 * len(lengths) + 0.6), max(2.8, 0.5 * len(depths) + 1.3)
    figure = new_figure(1.6 + len(cells_by_model) * width, height)
    panels = figure.subplots(1, len(cells_by_model), sharey=True, squeeze=False)[0]
    for panel, (name, cells) in zip(panels, cells_by_model.items(), strict=True):
        found = {(cell["depth"], cell["length"]): 100 * cell["accuracy"] for cell in cells}
        grid = [[found.get((depth, length), float("nan")) for length in lengths] for depth in depths]
        for (row, depth), (column, length) in product(enumerate(depths), enumerate(lengths)):
            percent = found.get((depth, length))
            text = "–" if percent is None else f"{percent:.0f}"
            colour = "white" if percent is not None and percent <= 55 else "black"
            panel.text(column, row, text, ha="center", va="center", color=colour, fontsize=9)
        image = panel.imshow(grid, cmap="cividis", vmin=0, vmax=100, aspect="auto")
        panel.set_title(name, fontsize=10)
        panel.set_xticks(range(len(lengths)), [f"{length:,}" for length in lengths], rotation=45 * (len(lengths) > 5))
        panel.set_yticks(range(len(depths)), [f"{100 * depth:.0f} %" for depth in depths])
        panel.set_xlabel("prompt length (tokens)")
    panels[0].set_ylabel("depth of the fact in the text")
    figure.colorbar(image, ax=list(panels), label="retrieved (%)")
    return save(figure, Path(path))


def position_curves(results_by_text: dict[str, dict[str, dict]], path: str | Path) -> Path:
    """Draw loss by position in the document (log scale), one panel per text, one line per model."""
    figure = new_figure(max(5.0, 3.6 * len(results_by_text)), 3.4)
    panels = figure.subplots(1, len(results_by_text), squeeze=False)[0]
    for panel, (title, results) in zip(panels, results_by_text.items(), strict=True):
        for colour, (name, result) in zip(COLOURS, results.items(), strict=False):
            rows = result["by_position"]
            middles = [(row["from"] + row["to"]) / 2 for row in rows]
            panel.plot(middles, [row["loss"] for row in rows], color=colour, marker="o", markersize=3, label=name)
        panel.set_xscale("log", base=2)
        panel.xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
        panel.tick_params(axis="x", labelsize=8)
        panel.set_title(title, fontsize=10)
        panel.set_xlabel("position (tokens)")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    panels[0].set_ylabel("loss (nats a token)")
    return save(figure, Path(path))


def read_log(file: str | Path) -> dict[str, list[tuple[int, float]]]:
    """Return the (iteration, loss) points of every stage of a training log; a repeated iteration counts once."""
    file = Path(file)
    if not file.is_file():
        raise HyLoError(f"training log {file} not found: expected JSON lines with stage, iteration and loss")
    stages: dict[str, dict[int, float]] = {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines()
    for number, line in enumerate(lines, 1):
        try:
            record = json.loads(line) if line.strip() else None
        except (ValueError, RecursionError) as error:
            if number == len(lines):  # the run was stopped while it wrote this line
                break
            reason = getattr(error, "msg", "too long or too deep")
            raise HyLoError(f"{file}, line {number}: not JSON ({reason})") from error
        if not isinstance(record, dict):
            continue
        iteration, loss = record.get("iteration"), record.get("loss")
        if isinstance(iteration, int) and isinstance(loss, int | float):
            stages.setdefault(str(record.get("stage", "")), {})[iteration] = float(loss)
    if lines and not stages:
        raise HyLoError(f"training log {file} has no losses: expected JSON lines with stage, iteration and loss")
    return {stage: sorted(points.items()) for stage, points in stages.items()}


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Return the mean over ``window`` values around each value; centred at the start, one-sided at the end."""
    means = []
    for index in range(len(values)):
        reach = min(window // 2, index)
        around = values[index - reach : index + reach + 1]
        means.append(sum(around) / len(around))
    return means


def loss_curves(logs: Sequence[str | Path], path: str | Path) -> Path | None:
    """Draw a panel per stage, whose losses are different quantities, with a line per log; None without losses."""
    curves = {Path(log).stem: read_log(log) for log in logs}
    if len(curves) < len(logs):
        curves = {str(log): read_log(log) for log in logs}
    stages = list(dict.fromkeys(stage for stages in curves.values() for stage in stages))
    if not stages:
        return None
    figure = new_figure(max(5.0, 3.6 * len(stages)), 3.4)
    for panel, stage in zip(figure.subplots(1, len(stages), squeeze=False)[0], stages, strict=True):
        for colour, (name, points) in enumerate((name, by_stage.get(stage)) for name, by_stage in curves.items()):
            if points:
                _draw_curve(panel, points, COLOURS[colour % len(COLOURS)], name)
        low, high = panel.dataLim.intervaly
        if low > 0 and high / low > 8:
            panel.set_yscale("log")
            for axis_ticks in (panel.yaxis.set_major_formatter, panel.yaxis.set_minor_formatter):
                axis_ticks(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "125" else "")
        panel.set_title(stage or "training", fontsize=10)
        panel.set_xlabel("iteration")
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8)
    figure.axes[0].set_ylabel("loss")
    return save(figure, Path(path))


def _draw_curve(panel, points: list[tuple[int, float]], colour: str, name: str) -> None:
    iterations, losses = zip(*points, strict=True)
    if len(points) < SMOOTH_FROM:
        panel.plot(iterations, losses, color=colour, marker="o", markersize=2.5, linewidth=1.4, label=name)
        return
    panel.plot(iterations, losses, color=colour, alpha=0.25, linewidth=0.8)
    panel.plot(iterations, running_mean(losses, len(losses) // 20), color=colour, linewidth=1.6, label=name)
