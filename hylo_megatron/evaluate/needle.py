"""Needle retrieval: hide one fact in prose, ask for it at the end, decode freely, and score the number in the
answer.
"""

import math
import re
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.greedy import end_tokens, greedy
from hylo_megatron.evaluate.models import rows_per_batch
from hylo_megatron.evaluate.prompts import MAX_NEW_TOKENS, NeedlePrompt, Prose, make_needles

NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+|\d+")
NUMBER_IS_OVER = re.compile(r"\d(?:[^\d,]|,\D)")
NORMAL_95 = 1.959964


def first_number(text: str) -> str:
    """Return the first run of digits without thousands separators; empty if there is none."""
    found = NUMBER.search(text)
    return found.group().replace(",", "") if found else ""


def wilson(hits: int, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a share after ``hits`` of ``samples``.

    Wilson's interval also holds at 0 and 100 %.
    """
    share, square = hits / samples, NORMAL_95**2
    centre = share + square / (2 * samples)
    reach = NORMAL_95 * math.sqrt(share * (1 - share) / samples + square / (4 * samples**2))
    low, high = ((centre + sign * reach) / (1 + square / samples) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def answer_batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, needles: list[NeedlePrompt]) -> list[str]:
    """Return greedy continuations of prompts of one length, each up to the end of its first number."""
    ends = end_tokens(model, tokenizer)

    def finished(ids: list[int]) -> bool:
        return ids[-1] in ends or bool(NUMBER_IS_OVER.search(tokenizer.decode(ids)))

    answers = greedy(model, [needle.ids for needle in needles], MAX_NEW_TOKENS, finished)
    return tokenizer.batch_decode(answers, skip_special_tokens=True)


def batches(needles: list[NeedlePrompt], model: PreTrainedModel, batch_size: int | None) -> Iterator[list[int]]:
    """Yield indices of needles whose prompts have exactly one length, as many at once as suit the device.

    The batches of a length are as equal as possible, because GPU kernels are compiled again for another number of
    rows.
    """
    groups: dict[int, list[int]] = {}
    for index, needle in enumerate(needles):
        groups.setdefault(len(needle.ids), []).append(index)
    for length, group in groups.items():
        count = -(-len(group) // rows_per_batch(model, length, batch_size))
        rows = -(-len(group) // count)
        yield from (group[start : start + rows] for start in range(0, len(group), rows))


def tally(results: Iterable[dict], *names: str) -> list[dict]:
    """Return hits, samples and accuracy for every value of the fields ``names``, in order of first appearance."""
    totals: dict[tuple, dict] = {}
    for result in results:
        group = {name: result[name] for name in names}
        total = totals.setdefault(tuple(group.values()), {**group, "hits": 0, "samples": 0})
        total["hits"] += result["hit"]
        total["samples"] += 1
    return [{**total, "accuracy": total["hits"] / total["samples"]} for total in totals.values()]


def by_length(results: list[dict]) -> list[dict]:
    """Return the results of each length over all depths, with the 95 % interval ``low`` to ``high`` of the
    accuracy.
    """
    rows = tally(results, "length")
    return [row | dict(zip(("low", "high"), wilson(row["hits"], row["samples"]), strict=True)) for row in rows]


def needles_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    lengths: Iterable[int] = (1024, 2048),
    depths: int = 5,
    samples: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
    label: str = "",
) -> dict:
    """Measure retrieval over depth x length with ``samples`` prompts per cell. Accuracies lie between 0 and 1.

    Returns accuracy, by_length, cells, samples, seconds, and prompt_seconds, the part of the seconds that making the
    prompts took.
    """
    if depths < 1 or samples < 1:
        raise HyLoError(f"{depths} depths and {samples} samples of needles: expected at least 1 of each")
    began = time.perf_counter()
    needles = make_needles(Prose(file, tokenizer), lengths, depths, samples, seed)
    made, answers, shown = time.perf_counter(), {}, 0.0
    for batch in batches(needles, model, batch_size):
        answers.update(zip(batch, answer_batch(model, tokenizer, [needles[i] for i in batch]), strict=True))
        if label and (time.perf_counter() - shown > 5 or len(answers) == len(needles)):
            shown = time.perf_counter()
            hits = sum(first_number(answer) == needles[i].value for i, answer in answers.items())
            print(f"{label}: {len(answers)}/{len(needles)} prompts, {hits} found, {shown - began:.0f} s", flush=True)
    results = []
    for index, needle in enumerate(needles):
        fields = {name: getattr(needle, name) for name in ("length", "depth", "placed_depth", "key", "value")}
        hit = first_number(answers[index]) == needle.value
        results.append({**fields, "prompt_tokens": len(needle.ids), "answer": answers[index], "hit": hit})
    return {
        "accuracy": sum(result["hit"] for result in results) / max(1, len(results)),
        "by_length": by_length(results),
        "cells": tally(results, "length", "depth"),
        "samples": results,
        "seconds": round(time.perf_counter() - began, 2),
        "prompt_seconds": round(made - began, 2),
    }
