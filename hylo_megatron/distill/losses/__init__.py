"""Losses, a file each, and their registry. No torch is imported before a loss is computed.

A loss is a frozen dataclass. Its fields are its flags (``hylo_megatron/options.py``). It names what the log shows and
tells the planner how much memory it takes. To add a loss, write its file and name it in ``LOSSES``. ``--hylo-loss``
then offers it in the kinds of stage that it fits. Its plain form, which tests compare with, is in
``tests/helpers/kl.py``.
"""

import argparse
from collections.abc import Iterable

from hylo_megatron.config.stages import StageKind
from hylo_megatron.distill.losses.divergences import JSD, ReverseKL
from hylo_megatron.distill.losses.ild import LayerDistance
from hylo_megatron.distill.losses.kl import KL, HeadShape
from hylo_megatron.distill.losses.loss import Loss
from hylo_megatron.errors import HyLoError
from hylo_megatron.options import defaults, from_options, takes_value

LOSSES: dict[str, type[Loss]] = {"ild": LayerDistance, "kl": KL, "reverse-kl": ReverseKL, "jsd": JSD}

# A flag that every loss of logits reads through the data set, so that it is no setting of one loss.
ANSWERS = "hylo_answer_weight"

__all__ = ["JSD", "KL", "LOSSES", "HeadShape", "LayerDistance", "Loss", "ReverseKL", "check_levers", "fitting",
           "foreign", "loss_class", "loss_of"]  # fmt: skip


def loss_class(
    kind: StageKind, name: str | None = None, prefix: str = "--hylo-", stage: str = "--hylo-stage"
) -> type[Loss]:
    """Return the loss ``name`` (default: the usual one of ``kind``). Raises ``HyLoError`` if it does not fit.

    ``prefix`` and ``stage``: those of ``check_levers``.
    """
    found = LOSSES[name or kind.loss]
    if found.layerwise != kind.layerwise:
        fits = [each for each, loss in LOSSES.items() if loss.layerwise == kind.layerwise]
        raise HyLoError(f"{prefix}loss {name} does not fit {stage} {kind.name}: expected {' or '.join(fits)}")
    return found


def loss_of(kind: StageKind, values: argparse.Namespace) -> Loss:
    """Return the loss of a training, with the settings that its flags give."""
    return from_options(loss_class(kind, values.hylo_loss), values)


def foreign(kind: StageKind, loss: str | None = None) -> dict[str, bool]:
    """Return the names of flags that change nothing in a training by this loss, and whether each takes a value."""
    own = loss_class(kind, loss)
    found = {name: value for each in LOSSES.values() for name, value in takes_value(each).items()}
    kept = takes_value(own) if own.layerwise else takes_value(own) | {ANSWERS: True}
    return {name: value for name, value in (found | {ANSWERS: True}).items() if name not in kept}


def fitting(flags: Iterable, kind: StageKind, loss: str | None = None) -> list[str]:
    """Return ``flags``, which are meant for several stages, without those that change nothing in this one."""
    others, found, words = foreign(kind, loss), [], iter(map(str, flags))
    for word in words:
        flag, equals, _ = word.partition("=")
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in others:
            found.append(word)
        elif others[name] and not equals:
            next(words, None)
    return found


def check_levers(kind: StageKind, values: argparse.Namespace, prefix: str = "--hylo-", stage: str = "--hylo-stage"):
    """Raise ``HyLoError`` for a flag on the command line that changes nothing in this training.

    ``values.given`` has the flags on the command line. ``prefix`` and ``stage`` are spellings of the command.
    """

    def flag(name: str) -> str:
        return prefix + name.removeprefix("hylo_").replace("_", "-")

    own = defaults(loss_class(kind, values.hylo_loss, prefix, stage))
    for name in foreign(kind, values.hylo_loss):
        if name in values.given:
            value = getattr(values, name)
            shown = flag(name) if value is True else f"{flag(name)} {value}"
            loss = values.hylo_loss or kind.loss
            raise HyLoError(f"{shown} has no effect: {stage} {kind.name} has the loss {loss}; leave it out")
    if getattr(values, "hylo_ce_from", 0.0) and "hylo_ce_from" in own and not values.hylo_ce_weight:
        raise HyLoError(
            f"--hylo-ce-from {values.hylo_ce_from} has no effect: --hylo-ce-weight is 0; give one, or leave it out"
        )
    beyond = "hylo_ce_beyond_teacher"
    if beyond in values.given and beyond in own and not values.hylo_teacher_length:
        raise HyLoError(f"{flag(beyond)} has no effect: {flag('hylo_teacher_length')} is not given; leave it out")
