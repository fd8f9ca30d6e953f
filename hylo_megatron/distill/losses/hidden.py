"""Distance between hidden states of student and teacher in end-to-end stages, beside the divergence of logits.

Legend: S sequence, B batch, D width of both models.
"""

from torch import Tensor

from hylo_megatron.kernels.norm import wide


def hidden_distance(student_SBD: Tensor, teacher_SBD: Tensor, mask_SB: Tensor) -> Tensor:
    """Return the sum over tokens of the loss mask of the mean squared difference of two hidden states.

    The teacher may have read the first tokens only; the others do not count.
    """
    taught = len(teacher_SBD)
    difference = wide(student_SBD[:taught]) - wide(teacher_SBD)
    return (difference.square().mean(-1) * mask_SB[:taught]).sum()


def shared_gradient(value: Tensor, ranks: int) -> Tensor:
    """Return ``value`` with ``1 / ranks`` of its gradient, for ranks with one value whose gradients are summed."""
    own = value / ranks
    return own + (value - own).detach()
