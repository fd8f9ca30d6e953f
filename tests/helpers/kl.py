"""Inputs of the distillation loss, and the loss over whole logits to compare the chunked one with."""

import torch

from hylo_megatron.distill.head import HeadInputs, reference_loss, token_weights
from hylo_megatron.distill.losses import KL

ROWS, VOCAB = 40, 33  # of the heads: the last seven rows are padding
PLAIN = KL()


def kl_inputs(length: int, loss: KL = PLAIN, rows: int = ROWS, vocab: int = VOCAB, width: int = 12,
              teacher_width: int = 20) -> HeadInputs:  # fmt: skip
    def random(*shape):
        return torch.randn(*shape, generator=generator)

    generator = torch.Generator().manual_seed(0)
    mask_T = (torch.rand(length, generator=generator) > 0.4).float()
    answers_T = 5.0 * (torch.rand(length, generator=generator) > 0.8) if loss.teacher_length else None
    return HeadInputs(
        h_TD=random(length, width).requires_grad_(), head_ND=random(rows, width).requires_grad_(),
        t_TC=random(min(length, loss.teacher_length or length), teacher_width),
        teacher_head_NC=random(rows, teacher_width) * 0.7,
        labels_T=torch.randint(vocab, (length,), generator=generator),
        mask_T=mask_T, position_T=torch.arange(length), answer_weight_T=answers_T, vocab_size=vocab,
    )  # fmt: skip


def whole_logits(x: HeadInputs, loss: KL):
    student, vocab = x.h_TD @ x.head_ND.T, x.vocab_size
    teacher = torch.zeros_like(student)
    teacher[: len(x.t_TC)] = x.t_TC @ x.teacher_head_NC.T
    return reference_loss(student[:, :vocab], teacher[:, :vocab], token_weights(x, loss), loss)


def gradients(loss, *tensors):
    return torch.autograd.grad(3.0 * loss, tensors)  # not one: the factor has to arrive
