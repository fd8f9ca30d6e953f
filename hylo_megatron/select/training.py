"""Short trainings inside a selection: which rows a step reads, and AdamW with fp32 copies of 16-bit parameters.

Legend: B rows, S tokens of a row, T tokens, D model.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from hylo_megatron.select.judge import CHUNK, divergence, hidden

WARMUP = 0.1  # share of the steps


@dataclass(frozen=True, kw_only=True)
class Training:
    """``steps`` of ``batch`` rows each, with peak learning rate ``lr``."""

    steps: int
    batch: int
    lr: float

    def rows(self, step: int, available: int) -> list[int]:
        """Return the numbers of the rows that a step reads; after the last row comes the first again."""
        return [(step * self.batch + place) % available for place in range(self.batch)]

    def factor(self, step: int) -> float:
        """Return the share of the learning rate at a step: linear warm-up, then a cosine to 0."""
        warm = max(1, round(WARMUP * self.steps))
        if step < warm:
            return (step + 1) / warm
        return (1 + math.cos(math.pi * (step - warm) / max(1, self.steps - warm))) / 2


class Masters:
    """AdamW on fp32 copies. bf16 parameters alone would lose most updates to rounding."""

    def __init__(self, parameters: Iterable[nn.Parameter], training: Training):
        self.parameters = list(parameters)
        self.masters = [parameter.detach().float().clone() for parameter in self.parameters]
        self.optimizer = torch.optim.AdamW(self.masters, lr=training.lr, betas=(0.9, 0.95), weight_decay=0.0)
        self.schedule = torch.optim.lr_scheduler.LambdaLR(self.optimizer, training.factor)

    def step(self) -> None:
        for master, parameter in zip(self.masters, self.parameters, strict=True):
            master.grad = None if parameter.grad is None else parameter.grad.float()
            parameter.grad = None
        torch.nn.utils.clip_grad_norm_(self.masters, 1.0)
        self.optimizer.step()
        self.schedule.step()
        with torch.no_grad():
            for master, parameter in zip(self.masters, self.parameters, strict=True):
                parameter.copy_(master)


def mean_divergence(teacher: nn.Module, student: nn.Module, ids_BS: Tensor) -> Tensor:
    """Return KL(teacher || student) in nats per token, with a graph. Logits are recomputed in the backward pass."""
    with torch.no_grad():
        taught_TD = hidden(teacher, ids_BS).flatten(0, 1)
    found_TD = hidden(student, ids_BS).flatten(0, 1)
    chunks = zip(taught_TD.split(CHUNK), found_TD.split(CHUNK), strict=True)
    parts = (checkpoint(divergence, teacher, student, *chunk, use_reentrant=False) for chunk in chunks)
    return sum(parts) / ids_BS.numel()
