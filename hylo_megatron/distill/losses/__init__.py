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
from hylo_megatron.options import from_options

LOSSES: dict[str, type[Loss]] = {"ild": LayerDistance, "kl": KL, "reverse-kl": ReverseKL, "jsd": JSD}

__all__ = ["JSD", "KL", "LOSSES", "HeadLoss", "HeadShape", "LayerDistance", "LayerLoss", "Loss", "ReverseKL",
           "loss_class", "loss_of"]  # fmt: skip


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
