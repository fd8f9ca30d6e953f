"""The table at the end of a run."""

import math
import statistics
from pathlib import Path

import torch

from hylo_megatron.markdown import table
from hylo_megatron.recipes.stage import Recipe, Stage
from hylo_megatron.run.records import read_report, read_sample, read_steps

JUDGED = ("prose", "code")  # kinds of text in the mean loss


def both(figures: dict) -> float:
    """Return the mean loss of prose and code together (of those that exist), in nats per token."""
    parts = [figures["perplexity"][kind] for kind in JUDGED if kind in figures["perplexity"]]
    return sum(part["loss"] * part["tokens"] for part in parts) / sum(part["tokens"] for part in parts)


def speed(log: Path, stage: Stage) -> tuple[float, float]:
    """Return a stage's tokens per second in the median step, and its peak GiB over all steps (0 on a CPU)."""
    lines = read_steps(log)
    seconds = [line["seconds"] for line in lines if line["seconds"]]
    tokens = stage.global_batch * stage.seq_length
    return tokens / statistics.median(seconds) if seconds else 0.0, max(line["memory_gib"] for line in lines)


def _perplexities(name: str, tokens: int, figures: dict, teacher: dict) -> list[str]:
    cells = []
    for kind, part in figures["perplexity"].items():
        ratio = part["perplexity"] / teacher["perplexity"][kind]["perplexity"]
        cells.append(f"{part['perplexity']:.2f}" + ("" if figures is teacher else f" ({ratio:.2f}x)"))
    return [name, f"{tokens:,}", *cells, f"{both(figures):.3f}"]


def _stages_table(out: Path, recipe: Recipe, reports: dict, teacher: dict) -> str:
    head = ["held-out perplexity", "tokens", *teacher["perplexity"], "loss", "tokens/s", "peak GiB"]
    rows, tokens = [head, [*_perplexities("teacher", 0, teacher, teacher), "", ""]], 0
    rows.append([*_perplexities("student, initialised", 0, reports["init"]["model"], teacher), "", ""])
    for stage in recipe.stages:
        tokens += stage.tokens
        rate, memory = speed(out / stage.name / "train_log.jsonl", stage)
        cells = _perplexities(f"after {stage.name}", tokens, reports[stage.name]["model"], teacher)
        rows.append([*cells, f"{rate:,.0f}", f"{memory:.1f}" if memory else ""])
    return table(rows, aligned=True)


def _needle_table(final: dict) -> str:
    found = {role: {row["length"]: row for row in final[role]["needle"]["by_length"]} for role in ("teacher", "model")}
    lengths = sorted(found["model"])
    rows = [["needles found", *(f"{length:,}" for length in lengths)]]
    for name, role in (("teacher", "teacher"), ("student", "model")):
        cells = [found[role].get(length) for length in lengths]
        rows.append([name, *(f"{cell['hits']}/{cell['samples']}" if cell else "not run" for cell in cells)])
    return table(rows, aligned=True)


def _windows(student: dict, teacher_cache: int) -> str:
    """Return what the student's windows cache, in bytes and in tokens of the teacher's cache."""
    size = student.get("window_cache_bytes", 0)
    return (
        f", and {size:,} a request for windows (as {size / teacher_cache:,.0f} tokens of the teacher)" if size else ""
    )


def closing_table(out: Path, recipe: Recipe, layout, seconds: float) -> str:
    """Return perplexity and loss of teacher and student after each stage, needles, cache sizes and a sample answer."""
    names = ["init", *(stage.name for stage in recipe.stages)]
    reports = {name: read_report(out / f"eval-{name}.json") for name in names}
    final, sample = reports[names[-1]], read_sample(out / "sample.json")
    teacher, start = final["teacher"], reports["init"]["model"]
    left = math.exp(both(final["model"]) - both(start))
    cache = [final[role]["kv_cache_bytes_per_token"] for role in ("teacher", "model")]
    versions = ", ".join(f"{name} {version}" for name, version in final["versions"].items())
    device = f"{torch.cuda.device_count()} x {final['device']}" if torch.cuda.is_available() else "CPU"
    return "\n".join([
        "", _stages_table(out, recipe, reports, teacher), "", _needle_table(final), "",
        f"perplexity, relative to the freshly initialised student: {left:.0%}",
        f"KV cache per token, bf16: teacher {cache[0]:,} bytes, student {cache[1]:,} ({cache[1] / cache[0]:.1%})"
        f"{_windows(final['model'], cache[0])}",
        f"{sample['prompt']}  teacher: {sample['teacher']!r}  student: {sample['student']!r}",
        f"{recipe.name} {recipe.plan}, seed {recipe.seed}, {layout}, {device}, {versions}",
        f"report: {out / 'report' / 'evaluation.md'}   model: {out / f'hf-{names[-1]}'}   {seconds / 60:.1f} minutes",
    ])  # fmt: skip
