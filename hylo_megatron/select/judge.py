"""Distance of a student from its teacher: divergence on text, and loss on the answers of retrieval samples.

Legend: B rows, S tokens of a row, D model, T tokens, N vocabulary.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.models import rows_per_batch
from hylo_megatron.select.rows import Rows

CHUNK = 1024  # tokens whose logits are in memory at once


@dataclass(frozen=True, kw_only=True)
class Measured:
    """``kl``: KL(teacher || student) in nats per token of text. ``answer_loss``: nats per token of an answer."""

    kl: float
    answer_loss: float | None = None


def hidden(model: nn.Module, ids_BS: Tensor) -> Tensor:
    """Return the states that the head reads, [B,S,D]."""
    return model.base_model(input_ids=ids_BS, use_cache=False).last_hidden_state


def divergence(teacher: nn.Module, student: nn.Module, taught_TD: Tensor, found_TD: Tensor) -> Tensor:
    """Return the sum of KL(teacher || student) over tokens, from the states that the heads read."""
    log_t = teacher.lm_head(taught_TD).float().log_softmax(-1)
    log_s = student.lm_head(found_TD).float().log_softmax(-1)
    return F.kl_div(log_s, log_t, reduction="sum", log_target=True)


def answer_losses(model: nn.Module, ids_BS: Tensor, answers_BS: Tensor) -> Tensor:
    """Return the sum of the losses of answers' tokens."""
    asked_BS = answers_BS[:, 1:]
    found_TD, targets_T = hidden(model, ids_BS)[:, :-1][asked_BS], ids_BS[:, 1:][asked_BS]
    parts = zip(found_TD.split(CHUNK), targets_T.split(CHUNK), strict=True)
    return sum(F.cross_entropy(model.lm_head(h_TD).float(), t_T, reduction="sum") for h_TD, t_T in parts)


class Judge:
    """Measures students of one teacher on the same rows. The teacher's states are computed once and kept."""

    def __init__(self, teacher: nn.Module, rows: Rows, batch_size: int | None = None):
        self.teacher, self.rows, self.batch_size = teacher, rows, batch_size
        with torch.no_grad():
            self.taught = [hidden(teacher, ids_BS) for (ids_BS,) in self._batches(rows.text_BS)]
        self.answered = self._answer_loss(teacher)

    def _batches(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        size = rows_per_batch(self.teacher, tensors[0].shape[1], self.batch_size)
        for parts in zip(*(tensor.split(size) for tensor in tensors), strict=True):
            yield tuple(part.to(self.teacher.device) for part in parts)

    @torch.no_grad()
    def _answer_loss(self, model: nn.Module) -> float | None:
        if self.rows.samples_BS is None:
            return None
        answers_BS = self.rows.answers_BS
        total = sum(answer_losses(model, *batch).double() for batch in self._batches(self.rows.samples_BS, answers_BS))
        return total.item() / int(answers_BS[:, 1:].sum())

    @torch.no_grad()
    def __call__(self, student: nn.Module) -> Measured:
        """Raises ``HyLoError`` if the student's logits are not finite."""
        total = torch.zeros((), dtype=torch.float64, device=self.teacher.device)
        for (ids_BS,), taught_BSD in zip(self._batches(self.rows.text_BS), self.taught, strict=True):
            states = (taught_BSD.flatten(0, 1), hidden(student, ids_BS).flatten(0, 1))
            for taught_TD, found_TD in zip(*(state.split(CHUNK) for state in states), strict=True):
                total += divergence(self.teacher, student, taught_TD, found_TD)
        kl, answer_loss = total.item() / self.rows.text_BS.numel(), self._answer_loss(student)
        if not (math.isfinite(kl) and math.isfinite(answer_loss or 0)):
            raise HyLoError("the student's divergence or loss of answers is not finite: the weights are broken")
        return Measured(kl=kl, answer_loss=answer_loss)
