"""95 % intervals: Wilson's for hits, Newcombe's for their differences, the bootstrap's for means and ratios."""

import math
from collections.abc import Sequence

import torch

NORMAL_95 = 1.959964
DRAWS = 1000
BLOCK = 10_000_000  # indices that are drawn at a time


def wilson(hits: float, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a share after ``hits`` of ``samples``; Wilson's also holds at 0 and 100 %."""
    share, square = hits / samples, NORMAL_95**2
    centre = share + square / (2 * samples)
    reach = NORMAL_95 * math.sqrt(share * (1 - share) / samples + square / (4 * samples**2))
    low, high = ((centre + sign * reach) / (1 + square / samples) for sign in (-1, 1))
    return max(0.0, low), min(1.0, high)


def bootstrap(values: Sequence[float], weights: Sequence[float] | None = None, seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of ``sum(values) / sum(weights)``, by drawing the pairs again with replacement.

    Without weights the ratio is the mean. A single pair says nothing about the spread: both ends are the ratio then.
    """
    values = torch.as_tensor(values, dtype=torch.float64)
    weights = torch.ones_like(values) if weights is None else torch.as_tensor(weights, dtype=torch.float64)
    generator, ratios, left = torch.Generator().manual_seed(seed), [], DRAWS
    while left:
        rows = min(left, max(1, BLOCK // len(values)))
        drawn = torch.randint(len(values), (rows, len(values)), generator=generator)
        ratios.append(values[drawn].sum(1) / weights[drawn].sum(1))
        left -= rows
    low, high = torch.quantile(torch.cat(ratios), torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
    return low, high


def newcombe(before: Sequence[float], after: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of the difference of two models' shares of hits at the same questions.

    Newcombe's interval of paired shares (1998, method 10) joins the Wilson intervals of both shares, and takes the
    correlation of the answers into account. It also holds if the models agree, or differ alike, at all questions.
    """
    count, old, new = len(before), sum(before), sum(after)
    both = sum(a * b for a, b in zip(before, after, strict=True))
    surplus = both * (count - old - new + both) - (old - both) * (new - both)
    surplus = max(surplus - count / 2, 0.0) if surplus > 0 else surplus
    spread = math.sqrt(old * (count - old) * new * (count - new))
    correlation = surplus / spread if spread else 0.0
    (old_low, old_high), (new_low, new_high) = wilson(old, count), wilson(new, count)

    def joined(one: float, other: float) -> float:
        return math.sqrt(max(0.0, one**2 - 2 * correlation * one * other + other**2))

    old, new = old / count, new / count
    return new - old - joined(new - new_low, old_high - old), new - old + joined(new_high - new, old - old_low)


def of_differences(before: Sequence[float], after: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of ``after - before``: two models' scores of the same questions.

    The interval is Newcombe's if every score is 0 or 1. Otherwise each draw of the bootstrap takes the same questions
    for both models. Differences that are all equal say nothing of their spread: there is no such interval then.
    """
    if all(score in (0, 1) for score in (*before, *after)):
        return newcombe(before, after)
    differences = [b - a for a, b in zip(before, after, strict=True)]
    return bootstrap(differences) if len(set(differences)) > 1 else None


def of_scores(scores: Sequence[float]) -> tuple[float, float]:
    """Return the 95 % interval of a mean score: Wilson's if every score is 0 or 1, otherwise the bootstrap's."""
    if all(score in (0, 1) for score in scores):
        return wilson(sum(scores), len(scores))
    return bootstrap(scores)
