"""``DistillSettings``: what a training trains, by which loss. No torch in here."""

import argparse
from dataclasses import dataclass

from hylo_megatron.config.stages import StageKind, stage_kind
from hylo_megatron.distill.losses import Loss, loss_of


@dataclass(frozen=True, kw_only=True)
class DistillSettings:
    """``train``: ``all``, or ``mixers``: what was copied from the base model stays frozen."""

    kind: StageKind
    train: str
    loss: Loss
    initial_states: str = "zero"  # of linear blocks: one of ``mixers.initial_states.MODES``
    seed: int = 1234  # of random initial states
    recurrence_block: int | None = None  # tokens of a segment of the linear blocks' recurrence
    offload_teacher: bool = False  # its layers are on the device only while they compute

    @classmethod
    def of(cls, args: argparse.Namespace) -> "DistillSettings":
        """Return the settings that the flags of a training give."""
        kind = stage_kind(args.hylo_stage)
        return cls(
            kind=kind,
            train=args.hylo_train or kind.train,
            loss=loss_of(kind, args),
            initial_states=args.hylo_initial_states,
            seed=args.seed,
            recurrence_block=args.hylo_recurrence_block,
            offload_teacher=args.hylo_offload_teacher,
        )
