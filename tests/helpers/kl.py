"""Inputs of the distillation loss, and plain forms of the losses to compare the fast ones with."""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.distill.head import HeadInputs, TokenWeights, token_weights
from hylo_megatron.distill.losses import JSD, KL

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


def plain_divergence(loss: KL, log_s: Tensor, log_t: Tensor) -> Tensor:
    """Return the divergence of each token, on one rank and without padded columns."""
    if isinstance(loss, JSD):
        p_s, p_t = log_s.exp(), log_t.exp()
        log_m = (loss.beta * p_t + (1 - loss.beta) * p_s).log()
        from_t, from_s = (p_t * (log_t - log_m)).sum(-1), (p_s * (log_s - log_m)).sum(-1)
        return loss.beta * from_t + (1 - loss.beta) * from_s
    log_p, log_q = (log_s, log_t) if loss.reverse else (log_t, log_s)
    return (log_p.exp() * (log_p - log_q)).sum(-1)


def reference_loss(student_TN: Tensor, teacher_TN: Tensor, weights: TokenWeights, loss: KL) -> Tensor:
    """Return what ``chunked_loss`` must equal, from whole logits without padding, on one rank."""
    log_s, log_t = ((x_TN / loss.temperature).log_softmax(-1) for x_TN in (student_TN, teacher_TN))
    kl_T = plain_divergence(loss, log_s, log_t) * loss.temperature**2
    ce_T = F.cross_entropy(student_TN, weights.labels_T, reduction="none")
    kl, ce = (kl_T * weights.mask_T * (weights.kl_T > 0)).sum(), (ce_T * weights.mask_T).sum()
    return torch.stack([(kl_T * weights.kl_T + ce_T * weights.ce_T).sum(), kl.detach(), ce.detach()])


def reference_hidden_distance(student_SBD: Tensor, teacher_SBD: Tensor, mask_SB: Tensor) -> Tensor:
    """Return ``hidden_distance`` by a loop over tokens."""
    total = torch.zeros(())
    for s, b in mask_SB[: len(teacher_SBD)].nonzero().tolist():
        total = total + ((student_SBD[s, b] - teacher_SBD[s, b]) ** 2).mean() * mask_SB[s, b]
    return total


def whole_logits(x: HeadInputs, loss: KL):
    student, vocab = x.h_TD @ x.head_ND.T, x.vocab_size
    teacher = torch.zeros_like(student)
    teacher[: len(x.t_TC)] = x.t_TC @ x.teacher_head_NC.T
    return reference_loss(student[:, :vocab], teacher[:, :vocab], token_weights(x, loss), loss)


def gradients(loss, *tensors):
    return torch.autograd.grad(3.0 * loss, tensors)  # not one: the factor has to arrive
