"""Constants of the planner's speed that measured steps ask for. No torch in here.

The time of a step is linear in the inverse of each rate, so a fit is a small linear least-squares problem.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hylo_megatron.planner.speed import FITTED, Constants, step_time
from hylo_megatron.planner.training import PlannedRun

RATES = ("products", "attention_cp", "nvlink")  # what steps on several GPUs tell; one GPU has told the others
ROUNDS = 500
LIMITS = 0.1, 10.0  # a fit that asks for more says that the formula is wrong, not the rate


@dataclass(frozen=True, kw_only=True)
class MeasuredStep:
    """A step and the seconds that it took."""

    run: PlannedRun
    seconds: float

    def error(self, card: float, constants: Constants) -> float:
        """Return by how much the planned speed is above the measured one, as a share of the measured one."""
        return self.seconds / step_time(self.run, card, constants).total - 1


def fitted_to(steps: Sequence[MeasuredStep], card: float, start: Constants = FITTED) -> Constants:
    """Return ``start`` with those of ``RATES`` changed that ``steps`` depend on; ``card``: its rate of products.

    Minimises the squares of the relative errors of the time. The rate of products is fitted only where a step on one
    GPU is among the steps: on several GPUs it cannot be told from the other rates.
    """
    alone = any(step.run.work.processes == 1 for step in steps)
    names = [name for name in RATES if alone or name != "products"]
    whole = [step_time(step.run, card, start).total for step in steps]
    # Doubling a rate takes away half of the time that depends on it.
    parts = {
        name: [
            2 * (total - step_time(step.run, card, replace(start, **{name: 2 * getattr(start, name)})).total)
            for step, total in zip(steps, whole, strict=True)
        ]
        for name in names
    }
    slower = dict.fromkeys(names, 1.0)
    for _ in range(ROUNDS):
        for name in names:
            slower[name] = _best(name, slower, parts, whole, [step.seconds for step in steps])
    return replace(start, **{name: getattr(start, name) / slower[name] for name in names})


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
