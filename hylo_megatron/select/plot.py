"""The picture of a selection: the score of each layer, chosen layers in another colour."""

from collections.abc import Collection
from pathlib import Path

from hylo_megatron.evaluate.plots import COLOURS, new_figure, save


def draw(scores: dict[int, float], chosen: Collection[int], title: str, path: Path) -> Path:
    """Draw a bar for each layer and save the picture as ``path``."""
    figure = new_figure(max(5.0, 0.28 * len(scores) + 1.2), 3.2)
    panel = figure.subplots()
    for colour, name, wanted in ((COLOURS[1], "MLA", True), (COLOURS[0], "linear", False)):
        layers = [layer for layer in sorted(scores) if (layer in chosen) == wanted]
        panel.bar(layers, [scores[layer] for layer in layers], color=colour, label=name)
    panel.axhline(0, color="black", linewidth=0.6)
    panel.set_xticks(sorted(scores), [str(layer) for layer in sorted(scores)], fontsize=8)
    panel.set_xlabel("layer")
    panel.set_ylabel("score")
    panel.set_title(title, fontsize=10)
    panel.grid(axis="y", alpha=0.3)
    panel.legend(fontsize=8)
    return save(figure, path)
