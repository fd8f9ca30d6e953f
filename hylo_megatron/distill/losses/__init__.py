"""Losses, a file each, and their registry. No torch is imported before a loss is computed.

A loss is a frozen dataclass. Its fields are its flags (``hylo_megatron/options.py``); it names what the log shows, has
the plain reference beside the fast form, and tells the planner how much memory it takes. To add a loss, write its file
and name it in ``LOSSES``; ``--hylo-loss`` then offers it in the kinds of stage that it fits.
"""

import argparse

from hylo_megatron.config.stages import StageKind
from hylo_megatron.distill.losses.divergences import JSD, ReverseKL
from hylo_megatron.distill.losses.ild import LayerDistance
from hylo_megatron.distill.losses.kl import KL
from hylo_megatron.distill.losses.loss import HeadLoss, HeadShape, LayerLoss, Loss
from hylo_megatron.errors import HyLoError
from hylo_megatron.options import defaults, from_options

LOSSES: dict[str, type[Loss]] = {"ild": LayerDistance, "kl": KL, "reverse-kl": ReverseKL, "jsd": JSD}

# Older flags of other losses are accepted: a recipe's runner gives its flags to every stage.
LEVERS = ("hylo_ce_from", "hylo_jsd_beta", "hylo_hidden_weight", "hylo_hidden_layers_weight")

__all__ = ["JSD", "KL", "LOSSES", "HeadLoss", "HeadShape", "LayerDistance", "LayerLoss", "Loss", "ReverseKL",
           "check_levers", "loss_class", "loss_of"]  # fmt: skip


def loss_class(kind: StageKind, name: str | None = None) -> type[Loss]:
    """Return the loss ``name`` (default: the usual one of ``kind``). Raises ``HyLoError`` if it does not fit."""
    found = LOSSES[name or kind.loss]
    if found.layerwise != kind.layerwise:
        fits = [each for each, loss in LOSSES.items() if loss.layerwise == kind.layerwise]
        raise HyLoError(f"--hylo-loss {name} does not fit --hylo-stage {kind.name}: expected {' or '.join(fits)}")
    return found


def loss_of(kind: StageKind, values: argparse.Namespace) -> Loss:
    """Return the loss of a training, with the settings that its flags give."""
    return from_options(loss_class(kind, values.hylo_loss), values)


def check_levers(kind: StageKind, values: argparse.Namespace) -> None:
    """Raise ``HyLoError`` for a lever among the flags that would change nothing in this training."""
    own = defaults(loss_class(kind, values.hylo_loss))
    every = {name: default for loss in LOSSES.values() for name, default in defaults(loss).items()}
    for name in LEVERS:
        flag, value = "--" + name.replace("_", "-"), getattr(values, name)
        if value != every[name] and name not in own:
            loss = values.hylo_loss or kind.loss
            raise HyLoError(
                f"{flag} {value} has no effect: --hylo-stage {kind.name} has the loss {loss}; leave it out"
            )
    if "hylo_ce_from" in own and values.hylo_ce_from and not values.hylo_ce_weight:
        raise HyLoError(
            f"--hylo-ce-from {values.hylo_ce_from} has no effect: --hylo-ce-weight is 0; give one, or leave it out"
        )
