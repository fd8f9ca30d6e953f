"""Compare the figures of the models of a report: perplexities with paired intervals, caches, scores."""

import math

from hylo_megatron.evaluate.intervals import bootstrap, of_differences
from hylo_megatron.evaluate.suites import REGISTRY, Row, Scores

ROLES = {"teacher": "teacher", "teacher_yarn": "teacher with YaRN", "control": "control", "model": "model"}
BASES = ("teacher", "control")  # roles that the model is compared with


def losses_of(figures: dict) -> dict[str, dict]:
    """Return all results of one model that have a loss per token: those of its texts and of long documents."""
    return figures.get("perplexity", {}) | ({"long": figures["long"]} if "long" in figures else {})


def compared(base: dict, model: dict) -> dict[str, dict]:
    """Return each ratio, and its 95 % interval (``low`` to ``high``) where it can be known.

    Both models read the same documents. The bootstrap draws documents and compares the models on each draw, so a
    document that is hard for both models does not widen the interval.
    """
    found = {}
    if base["kv_cache_bytes_per_token"]:
        ratio = model["kv_cache_bytes_per_token"] / base["kv_cache_bytes_per_token"]
        found["kv_cache"] = {"ratio": ratio}
    same = "tokenizer" not in base or base["tokenizer"] == model["tokenizer"]  # older reports have no fingerprint
    if base["vocabulary"] == model["vocabulary"] and same:
        before = losses_of(base)
        for text, after in losses_of(model).items():
            if text in before and before[text]["tokens"] == after["tokens"]:
                ratio = after["perplexity"] / before[text]["perplexity"]
                found[f"perplexity_{text}"] = {"ratio": ratio, **_paired(before[text], after)}
    return found


def _paired(before: dict, after: dict) -> dict:
    """Return the interval of a ratio; empty for a single document, or without losses of documents (older reports)."""
    pairs = list(zip(before.get("document_losses", ()), after.get("document_losses", ()), strict=False))
    if len(pairs) < 2 or any(a[0] != b[0] for a, b in pairs):
        return {}
    low, high = bootstrap([b[1] - a[1] for a, b in pairs], [a[0] for a, _ in pairs])
    return {"low": math.exp(low), "high": math.exp(high)}


def rows_of(entry: dict) -> dict[str, Row]:
    """Return the rows of each score of a model, by label."""
    return {row.label: row for name, suite in REGISTRY.items() if name in entry for row in suite.rows(entry[name])}


def differences(base: dict, model: dict) -> dict[str, dict]:
    """Return the model's accuracy minus the base's for each score that both have, by the label of its row.

    If both have answered the same questions there is a paired 95 % interval (``low`` to ``high``, see
    ``of_differences``), and the number of questions at which the model is ``better`` and ``worse``.
    """
    found, others = {}, rows_of(base)
    for label, row in rows_of(model).items():
        other = others.get(label, Row(label))
        if row.summary and other.summary:
            difference = row.summary["accuracy"] - other.summary["accuracy"]
            found[label] = {"difference": difference, **_of_pairs(other.scores, row.scores)}
    return found


def _of_pairs(before: Scores, after: Scores) -> dict:
    """Return interval and counts of pairs; empty for fewer than two questions, or for different ones."""
    if len(after) < 2 or [question for question, _ in before] != [question for question, _ in after]:
        return {}
    a, b = ([score for _, score in scores] for scores in (before, after))
    interval = dict(zip(("low", "high"), of_differences(a, b) or (), strict=False))
    better = sum(new > old for old, new in zip(a, b, strict=True))
    worse = sum(new < old for old, new in zip(a, b, strict=True))
    return {**interval, "better": better, "worse": worse, "samples": len(b)}
