"""The table that a run closes with."""

import json
import math
from pathlib import Path

from hylo_megatron.recipes.stage import Recipe

KINDS = ("prose", "code")


def both(figures: dict) -> float:
    """Mean loss of prose and code together, nats a token."""
    parts = [figures["perplexity"][kind] for kind in KINDS]
    return sum(part["loss"] * part["tokens"] for part in parts) / sum(part["tokens"] for part in parts)


def _row(name: str, tokens: int, figures: dict, teacher: dict) -> str:
    prose, code = (figures["perplexity"][kind]["perplexity"] for kind in KINDS)
    loss, ratio = both(figures), math.exp(both(figures) - both(teacher))
    cells = f"{prose:>8.2f} | {code:>8.2f} | {math.exp(loss):>8.2f} | {loss:>6.3f} | {ratio:>7.2f}x"
    return f"| {name:<21} | {tokens:>7,} | {cells} |"


def _header() -> list[str]:
    names = ("", "tokens", "prose", "code", "both", "loss", "/teacher")
    widths = (21, 7, 8, 8, 8, 6, 8)
    cells = [f" {name:>{width}} " for name, width in zip(names, widths, strict=True)]
    return ["held-out perplexity", "|" + "|".join(cells) + "|", "|" + "|".join("-" * len(c) for c in cells) + "|"]


def closing_table(out: Path, recipe: Recipe, seconds: float) -> str:
    """Perplexity and loss of teacher and student after each stage, the cache's size, a sample, where things lie."""
    last, names = recipe.stages[-1].name, ["init", *(stage.name for stage in recipe.stages)]
    reports = {name: json.loads((out / f"eval-{name}.json").read_text()) for name in names}
    final, sample = reports[last], json.loads((out / "sample.json").read_text())
    teacher, start, tokens = final["teacher"], reports["init"]["model"], 0
    lines = ["", *_header(), _row("teacher", 0, teacher, teacher), _row("student, initialised", 0, start, teacher)]
    for stage in recipe.stages:
        tokens += stage.tokens
        lines.append(_row(f"student after {stage.name}", tokens, reports[stage.name]["model"], teacher))
    left = math.exp(both(final["model"]) - both(start))
    cache = [final[role]["kv_cache_bytes_per_token"] for role in ("teacher", "model")]
    lines += [
        "",
        f"perplexity left of what there was after initialisation: {left:.0%}",
        f"KV cache per token, bf16: teacher {cache[0]:,} bytes, student {cache[1]:,} ({cache[1] / cache[0]:.1%})",
    ]
    if "needle" in final["model"]:
        found = [final[role]["needle"]["accuracy"] for role in ("teacher", "model")]
        lines.append(f"needles at {recipe.needle_lengths[-1]} tokens: teacher {found[0]:.0%}, student {found[1]:.0%}")
    lines += [
        f"{sample['prompt']}  teacher: {sample['teacher']!r}  student: {sample['student']!r}",
        f"report: {out / 'report' / 'evaluation.md'}   model: {out / f'hf-{last}'}   {seconds / 60:.1f} minutes",
    ]
    return "\n".join(lines)
