"""95 % intervals: Wilson's for hits, the bootstrap's for means, for ratios of sums and for differences of pairs."""

import math
from collections.abc import Sequence

import torch

NORMAL_95 = 1.959964
DRAWS = 1000
BLOCK = 10_000_000  # indices that are drawn at a time


def wilson(hits: float, samples: int) -> tuple[float, float]:
    """Return the 95 % interval of a share after ``hits`` of ``samples``.

    Wilson's interval also holds at 0 and 100 %.
    """
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


def of_differences(before: Sequence[float], after: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of the mean of ``after - before``: two models' scores of the same questions.

    Each draw takes the same questions for both models, so questions that both get right, or both wrong, widen nothing.
    """
    return bootstrap([b - a for a, b in zip(before, after, strict=True)], seed=seed)


def of_scores(scores: Sequence[float], seed: int = 0) -> tuple[float, float]:
    """Return the 95 % interval of a mean score: Wilson's if every score is 0 or 1, otherwise the bootstrap's."""
    if all(score in (0, 1) for score in scores):
        return wilson(sum(scores), len(scores))
    return bootstrap(scores, seed=seed)
