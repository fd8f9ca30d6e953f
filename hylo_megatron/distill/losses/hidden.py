"""Distance between hidden states of student and teacher in end-to-end stages, beside the divergence of logits.

Legend: S sequence, B batch, D width of both models.
"""

import torch
from torch import Tensor

from hylo_megatron.kernels.norm import wide


def hidden_distance(student_SBD: Tensor, teacher_SBD: Tensor, mask_SB: Tensor) -> Tensor:
    """Return the sum over tokens of the loss mask of the mean squared difference of two hidden states.

    The teacher may have read the first tokens only; the others do not count.
    """
    taught = len(teacher_SBD)
    difference = wide(student_SBD[:taught]) - wide(teacher_SBD)
    return (difference.square().mean(-1) * mask_SB[:taught]).sum()


def reference_hidden_distance(student_SBD: Tensor, teacher_SBD: Tensor, mask_SB: Tensor) -> Tensor:
    """``hidden_distance`` as a loop over tokens."""
    total = torch.zeros(())
    for s, b in mask_SB[: len(teacher_SBD)].nonzero().tolist():
        total = total + ((student_SBD[s, b] - teacher_SBD[s, b]) ** 2).mean() * mask_SB[s, b]
    return total


def shared_gradient(value: Tensor, ranks: int) -> Tensor:
    """Return ``value`` with ``1 / ranks`` of its gradient, for ranks with one value whose gradients are summed."""
    own = value / ranks
    return own + (value - own).detach()
