"""Run a task: prompts, answers of a model or of anything else, scores, and their means by cell."""

import time
from collections.abc import Callable, Iterable, Iterator

from hylo_megatron.evaluate.greedy import batches, end_tokens, greedy
from hylo_megatron.evaluate.intervals import of_scores
from hylo_megatron.evaluate.models import prefill_chunk
from hylo_megatron.evaluate.task import Prompt, Task

Answerer = Callable[[list[Prompt]], Iterable[tuple[int, str]]]  # yields the index of a prompt and its answer
SHOWN_EVERY = 5  # seconds


def answerer(model, tokenizer, task: Task, batch_size: int | None = None, chunk: int | None = None) -> Answerer:
    """Return what answers prompts of ``task`` with greedy continuations of a model.

    ``chunk``: tokens of a prompt that one forward pass reads; None: what keeps the mask small.
    """
    ends = end_tokens(model, tokenizer)

    def finished(ids: list[int]) -> bool:
        return ids[-1] in ends or task.finished(tokenizer.decode(ids))

    def answer(prompts: list[Prompt]) -> Iterator[tuple[int, str]]:
        for batch in batches([len(prompt.ids) for prompt in prompts], model, batch_size):
            ids = [prompts[i].ids for i in batch]
            piece = prefill_chunk(max(map(len, ids)), chunk)
            ids = greedy(model, ids, task.max_new_tokens, finished, piece)
            yield from zip(batch, tokenizer.batch_decode(ids, skip_special_tokens=True), strict=True)

    return answer


def summary(scores: list[float]) -> dict:
    """Return hits (the sum of the scores), samples, accuracy (their mean) and its 95 % interval, low to high."""
    low, high = of_scores(scores)
    hits = sum(scores)
    hits = int(hits) if hits == int(hits) else hits
    return {"hits": hits, "samples": len(scores), "accuracy": hits / len(scores), "low": low, "high": high}


def tally(results: Iterable[dict], *names: str) -> list[dict]:
    """Return the summary for every value of the fields ``names``, in order of first appearance."""
    groups: dict[tuple, list[dict]] = {}
    for result in results:
        groups.setdefault(tuple(result[name] for name in names), []).append(result)
    return [
        {**{name: group[0][name] for name in names}, **summary([result["score"] for result in group])}
        for group in groups.values()
    ]


def run(
    task: Task, tokenizer, answer: Answerer, *, lengths: Iterable[int], samples: int, seed: int = 0, label: str = ""
) -> dict:
    """Measure a task at every length. Accuracies lie between 0 and 1.

    Returns accuracy with its interval, by_length, cells, samples (a record of each, with its answer), seconds, and
    prompt_seconds, the part of the seconds that making the prompts took.
    """
    began, making, results, cells = time.perf_counter(), 0.0, [], ()
    for length in lengths:
        start = time.perf_counter()
        prompts = task.prompts(tokenizer, length, samples, seed)
        making += time.perf_counter() - start
        cells = tuple(prompts[0].cell)
        results += _answered(task, prompts, answer, f"{label}, {length:,} tokens" if label else "")
    return {
        **(summary([result["score"] for result in results]) if results else {}),
        "chance": task.chance,
        "by_length": tally(results, "length"),
        "cells": tally(results, "length", *cells),
        "samples": results,  # in place of their number
        "seconds": round(time.perf_counter() - began, 2),
        "prompt_seconds": round(making, 2),
    }


def _answered(task: Task, prompts: list[Prompt], answer: Answerer, label: str) -> list[dict]:
    """Return one record for each prompt: what the prompt says of itself, the answer and its score."""
    answers: dict[int, str] = {}
    total, began, shown = 0.0, time.perf_counter(), 0.0
    for index, text in answer(prompts):
        answers[index] = text
        total += task.score(text, prompts[index])
        if label and (time.perf_counter() - shown > SHOWN_EVERY or len(answers) == len(prompts)):
            shown = time.perf_counter()
            print(
                f"{label}: {len(answers)}/{len(prompts)} prompts, {total:g} right, {shown - began:.0f} s", flush=True
            )
    return [_record(task, prompt, answers[index]) for index, prompt in enumerate(prompts)]


def _record(task: Task, prompt: Prompt, answer: str) -> dict:
    fields = {name: value for name, value in vars(prompt).items() if name not in ("ids", "cell", "references")}
    return {
        **fields,
        **prompt.cell,
        "references": list(prompt.references),
        "prompt_tokens": len(prompt.ids),
        "answer": answer,
        "score": task.score(answer, prompt),
    }
