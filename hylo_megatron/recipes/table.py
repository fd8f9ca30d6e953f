"""The table that a run closes with."""

import json
from pathlib import Path

from hylo_megatron.recipes.stage import Recipe


def _row(name: str, tokens: int, figures: dict, teacher: dict) -> str:
    cells = []
    for kind in ("prose", "code"):
        mine, theirs = figures["perplexity"][kind], teacher["perplexity"][kind]
        cells.append(
            f"{mine['perplexity']:8.2f} ({mine['perplexity'] / theirs['perplexity']:5.2f}x) {mine['loss']:6.3f}"
        )
    return f"| {name:<22} | {tokens:>9,} | {cells[0]} | {cells[1]} |"


def closing_table(out: Path, recipe: Recipe, seconds: float) -> str:
    """Perplexity and loss of teacher and student after each stage, the cache's size, a sample, where things lie."""
    last = recipe.stages[-1].name
    reports = {
        name: json.loads((out / f"eval-{name}.json").read_text())
        for name in ("init", *(s.name for s in recipe.stages))
    }
    final, sample = reports[last], json.loads((out / "sample.json").read_text())
    teacher, lines, tokens = final["teacher"], [], 0
    head = f"| {'':<22} | {'tokens':>9} | {'prose: perplexity, loss':>25} | {'code: perplexity, loss':>25} |"
    lines += ["", head, f"|{'-' * 24}|{'-' * 11}|{'-' * 27}|{'-' * 27}|", _row("teacher", 0, teacher, teacher)]
    lines.append(_row("student, initialised", 0, reports["init"]["model"], teacher))
    for stage in recipe.stages:
        tokens += stage.tokens
        lines.append(_row(f"student after {stage.name}", tokens, reports[stage.name]["model"], teacher))
    cache = [final[role]["kv_cache_bytes_per_token"] for role in ("teacher", "model")]
    lines += [
        "",
        f"KV cache per token, bf16: teacher {cache[0]:,} bytes, student {cache[1]:,} ({cache[1] / cache[0]:.1%})",
    ]
    if "needle" in final["model"]:
        found = [final[role]["needle"]["accuracy"] for role in ("teacher", "model")]
        lines.append(f"needle at {recipe.needle_lengths}: teacher {found[0]:.0%}, student {found[1]:.0%}")
    lines += [
        f"{sample['prompt']}  teacher: {sample['teacher']!r}  student: {sample['student']!r}",
        f"report: {out / 'report' / 'evaluation.md'}   model: {out / f'hf-{last}'}   {seconds / 60:.1f} minutes",
    ]
    return "\n".join(lines)
