"""Scores of layers, computed from measurements, and the order in which layers are given attention."""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from hylo_megatron.errors import HyLoError
from hylo_megatron.select.cache import Cache, Layers, name_of
from hylo_megatron.select.judge import Measured
from hylo_megatron.select.ranks import Ranks


@dataclass(frozen=True, kw_only=True)
class Ranking:
    """``order``: layers, the one that needs attention most first. ``scores``: of each layer alone.

    ``rounds``: the scores that each layer of a greedy order was chosen by.
    """

    order: tuple[int, ...]
    scores: dict[int, float] = field(default_factory=dict)
    rounds: tuple[dict[int, float], ...] = ()


def by_score(scores: dict[int, float]) -> tuple[int, ...]:
    """Return the layers, highest score first; of equal ones the earlier layer."""
    return tuple(sorted(scores, key=lambda layer: (-scores[layer], layer)))


class Bench:
    """Measures sets of restored layers once each, on all ranks, and keeps the results in a cache."""

    def __init__(self, measure: Callable[[Layers], Measured], cache: Cache, ranks: Ranks, log=print):
        self.measure, self.cache, self.ranks, self.log = measure, cache, ranks, log
        self.known: dict[Layers, Measured] = ranks.from_first(cache.read() if ranks.first else None)

    def __call__(self, wanted: Iterable[Layers]) -> dict[Layers, Measured]:
        wanted = list(wanted)
        found = {}
        for layers in self.ranks.share([layers for layers in wanted if layers not in self.known]):
            found[layers] = self.measure(layers)
            self.cache.write(layers, found[layers])
            self.log(line(layers, found[layers]))
        self.known |= self.ranks.joined(found)
        return {layers: self.known[layers] for layers in wanted}


def line(layers: Layers, measured: Measured) -> str:
    """Return a measurement as a line for the log."""
    answers = "" if measured.answer_loss is None else f"  loss of answers {measured.answer_loss:.4f}"
    return f"attention at {name_of(layers):>8s}: divergence {measured.kl:.4f}{answers}"


@dataclass(frozen=True, kw_only=True)
class Score:
    """Share of the student's distance to its teacher that restoring a layer removes.

    A score is ``(1 - weight) * (drop of divergence) / (divergence) + weight * (drop of answers' loss) / (their loss
    above the teacher's)``. Both divisors belong to ``base``, the student without a restored layer, also in later
    rounds of a greedy selection, so scores of rounds can be compared. ``teacher``: the teacher's loss of answers.
    """

    base: Measured
    teacher: float | None = None
    weight: float = 0.0

    def __post_init__(self):
        if self.weight < 1 and not self.base.kl > 0:
            raise HyLoError("the student equals its teacher on --text: no layer needs attention there")
        if self.weight and not self.base.answer_loss > self.teacher:
            raise HyLoError(
                f"--retrieval: the teacher's loss of answers is {self.teacher:.3f}, the student's"
                f" {self.base.answer_loss:.3f}; expected a teacher that answers better: use shorter samples, or"
                " --retrieval-weight 0"
            )

    def __call__(self, before: Measured, after: Measured) -> float:
        score = 0.0
        if self.weight < 1:
            score += (1 - self.weight) * (before.kl - after.kl) / self.base.kl
        if self.weight:
            gap = self.base.answer_loss - self.teacher
            score += self.weight * (before.answer_loss - after.answer_loss) / gap
        return score


NONE: Layers = frozenset()


def scored(bench: Bench, score: Score, restored: Layers, candidates: Iterable[int]) -> dict[int, float]:
    """Return the score of restoring each candidate beside the layers that are ``restored`` already."""
    sets = {layer: restored | {layer} for layer in candidates}
    found = bench([restored, *sets.values()])
    return {layer: score(found[restored], found[layers]) for layer, layers in sets.items()}


def one_by_one(bench: Bench, score: Score, num_layers: int) -> Ranking:
    """Rank layers by the score of restoring each one alone."""
    scores = scored(bench, score, NONE, range(num_layers))
    return Ranking(order=by_score(scores), scores=scores)


def greedy(bench: Bench, score: Score, num_layers: int, count: int) -> Ranking:
    """Restore the best layer, rank the others beside it, and so on for ``count`` layers.

    The layers that were not chosen follow by their scores in the last round.
    """
    order, rounds = (), []
    while len(order) < count:
        rounds.append(scored(bench, score, frozenset(order), (n for n in range(num_layers) if n not in order)))
        order += by_score(rounds[-1])[:1]
    rest = tuple(layer for layer in by_score(rounds[-1]) if layer not in order)
    return Ranking(order=order + rest, scores=rounds[0], rounds=tuple(rounds))
