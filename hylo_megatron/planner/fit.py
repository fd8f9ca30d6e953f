"""Constants of the planner's speed that measured steps ask for. No torch in here.

The time of a step is nearly linear in the inverse of each rate, so a fit is a small linear least-squares problem.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hylo_megatron.planner.speed import FITTED, Constants, step_time
from hylo_megatron.planner.training import PlannedRun

RATES = ("products", "nvlink")  # what any table tells; attention needs steps of several lengths beside each other
# Constants that are seconds; the others are rates.
TIMES = ("score", "traffic", "optimizer", "recurrence", "chunk", "step")
CHOICES = tuple(name for name in vars(FITTED) if name not in ("node", "network"))  # no step on one host tells these
ROUNDS = 500
LIMITS = 0.1, 10.0  # a fit that asks for more says that the formula is wrong, not the rate


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """A step, the seconds that it took, and its card's rate of products."""

    run: PlannedRun
    seconds: float
    card: float

    def planned(self, constants: Constants) -> float:
        return step_time(self.run, self.card, constants).total

    def error(self, constants: Constants) -> float:
        """Return by how much the planned speed is above the measured one, as a share of the measured one."""
        return self.seconds / self.planned(constants) - 1


def mean_error(steps: Sequence[MeasuredStep], constants: Constants) -> float:
    return sum(abs(step.error(constants)) for step in steps) / len(steps)


def faster(constants: Constants, name: str, factor: float) -> Constants:
    """Return ``constants`` with the work of ``name`` done ``factor`` times as fast."""
    value = getattr(constants, name)
    return replace(constants, **{name: value / factor if name in TIMES else value * factor})


def fitted_to(steps: Sequence[MeasuredStep], start: Constants = FITTED, names: Sequence[str] = RATES) -> Constants:
    """Return ``start`` with those of ``names`` changed that ``steps`` depend on.

    Minimises the squares of the relative errors of the time. Where several rates explain the steps equally well, the
    first one changes.
    """
    whole = [step.planned(start) for step in steps]
    # Work that is twice as fast takes away half of its time.
    parts = {
        name: [2 * (total - step.planned(faster(start, name, 2))) for step, total in zip(steps, whole, strict=True)]
        for name in names
    }
    slower = dict.fromkeys(names, 1.0)
    for _ in range(ROUNDS):
        for name in names:
            slower[name] = _best(name, slower, parts, whole, [step.seconds for step in steps])
    for name in names:
        start = faster(start, name, 1 / slower[name])
    return start


def _best(name: str, slower: dict[str, float], parts: dict[str, list[float]], whole: list[float],
          measured: list[float]) -> float:  # fmt: skip
    """Return the factor of the time that depends on ``name``, all other factors kept."""
    above = below = 0.0
    for index, seconds in enumerate(measured):
        others = sum(parts[other][index] * (slower[other] - 1) for other in parts if other != name)
        own = parts[name][index] / seconds
        above += own * (1 - (whole[index] - parts[name][index] + others) / seconds)
        below += own * own
    return min(max(above / below, LIMITS[0]), LIMITS[1]) if below > 1e-9 else slower[name]
