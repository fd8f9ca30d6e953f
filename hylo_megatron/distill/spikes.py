"""Decide whether a step's loss is a spike, its gradient a burst, and whether a training has diverged. No torch."""

import math
from collections import deque
from dataclasses import dataclass, field
from statistics import median

from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import positive
from hylo_megatron.options import option

ACTIONS = ("warn", "skip", "rollback", "stop")
GATES = ("skip", "rollback")  # these decide before the weights change
WINDOW = 50  # steps whose median a step is compared with
LEAST = 10  # steps before anything is compared
SKIPS = 10  # steps skipped in a row, after which the training counts as diverged
ROLLBACKS = 3  # rollbacks, after which it counts as diverged


def json_number(value: float | None) -> float | str | None:
    """Return ``value`` for a line of JSON, which has neither NaN nor infinity: as text if it is not finite."""
    return value if value is None or math.isfinite(value) else str(value)


@dataclass(frozen=True, kw_only=True)
class SpikeSettings:
    """``factor`` and ``burst``: how many times the running median the loss and the gradient's norm may be.

    ``action``: one of ``ACTIONS``. The last 50 steps make the median; no step is compared before 10 steps are known.
    """

    factor: float = option(
        "--hylo-spike-factor", 3.0, positive, "a loss above this factor times the median of 50 steps is a spike"
    )
    burst: float = option(
        "--hylo-burst-factor", 10.0, positive, "the same of gradient norms: such a burst is logged with its samples"
    )
    action: str = "warn"

    def __post_init__(self):
        if self.factor <= 1 or self.burst <= 1:
            name, value = ("burst", self.burst) if self.factor > 1 else ("spike", self.factor)
            raise HyLoError(f"--hylo-{name}-factor {value}: expected a number above 1")

    @property
    def gates(self) -> bool:
        """Whether the decision is made before the weights change."""
        return self.action in GATES


@dataclass(kw_only=True)
class Spikes:
    """What is known of the steps so far. Each step asks ``judge`` once, and reports by ``took`` what became of it."""

    settings: SpikeSettings
    losses: deque = field(default_factory=lambda: deque(maxlen=WINDOW))
    norms: deque = field(default_factory=lambda: deque(maxlen=WINDOW))
    lowest: float = math.inf  # of the medians over a full window
    skipped: int = 0  # in a row
    rollbacks: int = 0

    def restart(self) -> None:
        """Forget all losses: the loss has other weights from now on."""
        self.losses.clear()
        self.lowest = math.inf

    def known(self) -> dict:
        """Return what a resumed run has to know, as JSON has it."""
        lowest = self.lowest if math.isfinite(self.lowest) else None
        return {"losses": [*self.losses], "norms": [*self.norms], "lowest": lowest, "skipped": self.skipped,
                "rollbacks": self.rollbacks}  # fmt: skip

    def resume(self, known: dict) -> None:
        """Go on from what ``known`` has returned."""
        self.losses.extend(known["losses"])
        self.norms.extend(known["norms"])
        self.lowest = math.inf if known["lowest"] is None else known["lowest"]
        self.skipped, self.rollbacks = known["skipped"], known["rollbacks"]

    def judge(self, loss: float, norm: float | None) -> str | None:
        """Return what is wrong with a step whose weights should not be trusted, or None."""
        if not math.isfinite(loss):
            return f"loss {loss}"
        if norm is not None and not math.isfinite(norm):
            return f"gradient norm {norm}"
        return self._above(loss, self.losses, self.settings.factor, "loss")

    def burst(self, norm: float | None) -> str | None:
        """Return a phrase if the gradient's norm is far above its median."""
        if norm is None or not math.isfinite(norm):
            return None
        return self._above(norm, self.norms, self.settings.burst, "gradient norm")

    @staticmethod
    def _above(value: float, earlier: deque, factor: float, what: str) -> str | None:
        usual = median(earlier) if len(earlier) >= LEAST else math.inf
        if not usual or value <= factor * usual:
            return None
        return (
            f"{what} {value:.4g} is {value / usual:.1f} times the median {usual:.4g} of the last {len(earlier)} steps"
        )

    def took(self, loss: float, norm: float | None, updated: bool) -> str | None:
        """Note a step. Returns what is wrong if the training as a whole has diverged, or None."""
        if not updated:
            self.skipped += 1
            if self.skipped >= SKIPS:
                return f"{self.skipped} steps in a row were skipped"
            return f"{self.rollbacks} rollbacks did not help" if self.rollbacks > ROLLBACKS else None
        self.skipped = 0
        self.losses.append(loss)
        if norm is not None:
            self.norms.append(norm)
        return self._level()

    def _level(self) -> str | None:
        if len(self.losses) < WINDOW:
            return None
        usual = median(self.losses)
        self.lowest = min(self.lowest, usual)
        if usual <= self.settings.factor * self.lowest:
            return None
        return f"the median loss of {WINDOW} steps has risen from {self.lowest:.4g} to {usual:.4g}"
