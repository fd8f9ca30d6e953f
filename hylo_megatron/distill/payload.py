"""What a pipeline stage sends to the next one in end-to-end distillation. Legend: S sequence, B batch, D student
width, C teacher width."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Payload:
    """Hidden states of student and teacher in one tensor ``[S, B, D + C]``: megatron sends one tensor a micro-batch.

    megatron sizes that tensor by ``config.hidden_size``, so the config of ``DistillModel`` has ``width`` there.
    """

    student_width: int
    teacher_width: int

    @property
    def width(self) -> int:
        return self.student_width + self.teacher_width

    def pack(self, student_SBD: Tensor, teacher_SBC: Tensor) -> Tensor:
        return torch.cat([student_SBD, teacher_SBC], -1)

    def unpack(self, packed: Tensor) -> tuple[Tensor, Tensor]:
        """Return the student's states, through which gradients flow, and the teacher's."""
        student_SBD, teacher_SBC = packed.split([self.student_width, self.teacher_width], -1)
        return student_SBD.contiguous(), teacher_SBC.detach().contiguous()
