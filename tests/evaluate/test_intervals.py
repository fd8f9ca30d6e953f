"""Intervals of scores and of their differences."""

import random

import pytest

from hylo_megatron.evaluate.intervals import bootstrap, of_differences, of_scores, wilson


def test_intervals():
    assert of_scores([1.0, 0.0, 1.0]) == wilson(2, 3)
    values = [random.Random(n).gauss(5, 2) for n in range(400)]
    low, high = bootstrap(values)
    assert high - low == pytest.approx(2 * 1.96 * 2 / 400**0.5, rel=0.2) and low < 5 < high
    assert bootstrap(values) == (low, high) != bootstrap(values, seed=1)
    assert bootstrap([3.0], [2.0]) == (1.5, 1.5)
    weights = [random.Random(n).uniform(1, 9) for n in range(50)]
    assert bootstrap([2 * weight for weight in weights], weights) == pytest.approx((2, 2))
    assert of_scores([0.5, 1.0, 0.0])[0] < 0.5 < of_scores([0.5, 1.0, 0.0])[1]


def test_intervals_of_differences_pair_the_questions():
    rng = random.Random(3)
    right = [float(rng.random() < 0.6) for _ in range(200)]
    assert of_differences(right, right) == pytest.approx((-0.01, 0.01), abs=3e-3)  # each alone: 7 points each way
    low, high = of_differences(right, [1 - score for score in right])
    assert low < 1 - 2 * sum(right) / 200 < high
    assert of_differences([0.25, 0.5], [0.5, 0.75]) is None  # equal differences have no spread
    low, high = of_differences([0.25, 0.5, 0.5], [0.5, 0.75, 0.25])
    assert low < 1 / 12 < high


def test_intervals_of_pairs_that_all_differ_alike():
    """Few questions are no proof, though no draw of them would differ. The last pairs are an example of Newcombe's."""
    assert of_differences([1.0] * 4, [1.0] * 4) == pytest.approx((-0.4899, 0.4899), abs=1e-4)
    assert of_differences([1.0] * 10, [0.0] * 10) == pytest.approx((-1, -0.6075), abs=1e-4)
    before, after = [1.0] * 36 + [0.0] * 12 + [1.0] * 2, [1.0] * 48 + [0.0] * 2
    assert of_differences(before, after) == pytest.approx((0.0569, 0.3404), abs=1e-4)


def test_intervals_cover_a_known_difference():
    """The model answers 30 % of what the base misses, and misses 10 % of what it answers: 5 points at 62.5 %."""
    rng, covered, widths = random.Random(0), 0, []
    for _ in range(100):
        before = [float(rng.random() < 0.625) for _ in range(150)]
        after = [float(rng.random() < (0.9 if score else 0.3)) for score in before]
        low, high = of_differences(before, after)
        covered += low <= 0.05 <= high
        widths.append(high - low)
    assert 88 <= covered <= 100
    apart = 2 * 1.96 * (0.625 * 0.375 / 150 + 0.675 * 0.325 / 150) ** 0.5  # of two models that were asked apart
    assert max(widths) < 0.85 * apart
