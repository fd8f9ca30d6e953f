"""KL divergence between teacher and student from hidden states: no logit matrix ever exists.

Legend: T tokens, D student width, C teacher width, N vocabulary rows on this tensor-parallel rank. Both LM heads are
sharded by vocabulary; each chunk of tokens needs two all-reduces a model (max and sum). Peak extra memory is a few
[chunk, N] blocks whatever T is. Gradients are formed in the forward pass (they are the same products, done once).
"""

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class KLSettings:
    """``reverse``: KL(student ‖ teacher), the direction of the paper's formula; its code computes the other one."""

    kl_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    reverse: bool = False
    chunk: int = 1024


def reference_loss(student_TN: Tensor, teacher_TN: Tensor, labels_T: Tensor, mask_T: Tensor, s: KLSettings):
    """The same loss from whole logits, a few lines: what the chunked one must equal. Sums over tokens."""
    log_s, log_t = ((x / s.temperature).log_softmax(-1) for x in (student_TN, teacher_TN))
    log_p, log_q = (log_s, log_t) if s.reverse else (log_t, log_s)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) * s.temperature**2
    ce = F.cross_entropy(student_TN, labels_T, reduction="none")
    kl, ce = (kl * mask_T).sum(), (ce * mask_T).sum()
    return s.kl_weight * kl + s.ce_weight * ce, kl.detach(), ce.detach()


class _Shard:
    """The vocabulary rows of this rank: padding masked out, sums taken over the group."""

    def __init__(self, rows: int, vocab_size: int, group):
        self.group = group if group is not None and group.size() > 1 else None
        self.first = rows * (group.rank() if self.group else 0)
        self.valid = max(0, min(rows, vocab_size - self.first))

    def sum(self, x: Tensor) -> Tensor:
        if self.group:
            dist.all_reduce(x, group=self.group)
        return x

    def log_softmax(self, logits_TN: Tensor) -> Tensor:
        """In place, over the whole vocabulary; padded columns become -inf."""
        logits_TN[:, self.valid :] = -torch.inf
        top = logits_TN.amax(-1, keepdim=True) if self.valid else logits_TN.new_full((len(logits_TN), 1), -torch.inf)
        if self.group:
            dist.all_reduce(top, dist.ReduceOp.MAX, group=self.group)
        logits_TN -= top
        return logits_TN.sub_(self.sum(logits_TN.exp().sum(-1, keepdim=True)).log_())

    def pick(self, x_TN: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` at the labels (summed over ranks), which rows hold theirs here, and at which column."""
        column = labels_T - self.first
        here = (column >= 0) & (column < self.valid)
        column = column.clamp(0, max(0, x_TN.shape[1] - 1))
        value = x_TN.gather(1, column[:, None])[:, 0].masked_fill(~here, 0.0)
        return self.sum(value), here, column


def _kl_and_gradient(log_s: Tensor, log_t: Tensor, shard: _Shard, reverse: bool) -> tuple[Tensor, Tensor]:
    """Per-token KL over the whole vocabulary and its gradient by the student's (tempered) logits, ``[T, N]``."""
    p_s = log_s.exp()
    difference = (log_s - log_t).nan_to_num_(0.0)  # -inf - -inf in padded columns
    if reverse:
        kl = shard.sum((p_s * difference).sum(-1))
        return kl, p_s.mul_(difference.sub_(kl[:, None]))
    p_t = log_t.exp()
    kl = shard.sum(-(p_t * difference).sum(-1))
    return kl, p_s.sub_(p_t)


class _HiddenStateKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TD, head_ND, t_TC, teacher_head_NC, labels_T, mask_T, vocab_size, group, reduce_input, s):
        shard = _Shard(head_ND.shape[0], vocab_size, group)
        need_h, need_head = h_TD.requires_grad, head_ND.requires_grad
        grad_h = torch.zeros_like(h_TD) if need_h else None
        grad_head = torch.zeros(head_ND.shape, dtype=torch.float32, device=h_TD.device) if need_head else None
        totals = torch.zeros(2, dtype=torch.float32, device=h_TD.device)
        for start in range(0, len(h_TD), s.chunk):
            rows = slice(start, start + s.chunk)
            kl, ce, gradient = _HiddenStateKL.chunk(h_TD[rows], head_ND, t_TC[rows], teacher_head_NC, labels_T[rows],
                                                    mask_T[rows], shard, s)  # fmt: skip
            totals += torch.stack([kl, ce])
            gradient = gradient.to(h_TD.dtype)
            if need_h:
                grad_h[rows] = gradient @ head_ND
            if need_head:
                grad_head += (gradient.T @ h_TD[rows]).float()
        if need_h and reduce_input:
            shard.sum(grad_h)
        ctx.save_for_backward(grad_h, None if grad_head is None else grad_head.to(head_ND.dtype))
        kl, ce = totals.unbind()
        ctx.mark_non_differentiable(kl, ce)
        return s.kl_weight * kl + s.ce_weight * ce, kl, ce

    @staticmethod
    def chunk(h, head, t, teacher_head, labels, mask, shard, s):
        logits = F.linear(h, head).float()
        gradient, ce = 0.0, logits.new_zeros(())
        if s.kl_weight:
            log_s = shard.log_softmax(logits / s.temperature)
            log_t = shard.log_softmax(F.linear(t, teacher_head).float() / s.temperature)
            kl_T, gradient = _kl_and_gradient(log_s, log_t, shard, s.reverse)
            gradient *= s.kl_weight * s.temperature  # T² of the loss over T of the logits
            kl = (kl_T * mask).sum() * s.temperature**2
            del log_t
        else:
            kl = logits.new_zeros(())
        log_p = log_s if s.kl_weight and s.temperature == 1.0 else shard.log_softmax(logits)
        value, here, column = shard.pick(log_p, labels)
        ce = -(value * mask).sum()
        if s.ce_weight:
            p = log_p.exp()
            p[here.nonzero()[:, 0], column[here]] -= 1.0
            gradient = gradient + s.ce_weight * p
        if isinstance(gradient, float):
            gradient = torch.zeros_like(logits)
        return kl, ce, gradient * mask[:, None]

    @staticmethod
    def backward(ctx, grad, *_):
        grad_h, grad_head = ctx.saved_tensors
        scaled = (None if g is None else g * grad.to(g.dtype) for g in (grad_h, grad_head))
        return *scaled, *([None] * 8)


def hidden_state_kl(h_TD: Tensor, head_ND: Tensor, t_TC: Tensor, teacher_head_NC: Tensor, labels_T: Tensor,
                    mask_T: Tensor, vocab_size: int, group=None, reduce_input_grad: bool = True,
                    settings: KLSettings = KLSettings()) -> tuple[Tensor, Tensor, Tensor]:  # noqa: B008  # fmt: skip
    """``(loss, kl, ce)``, each a sum over this rank's tokens weighted by ``mask_T``; only ``loss`` has a gradient.

    ``reduce_input_grad``: sum ``h``'s gradient over the group here (False under sequence parallelism, where the gather
    before this call does it).
    """
    return _HiddenStateKL.apply(
        h_TD, head_ND, t_TC, teacher_head_NC, labels_T, mask_T, vocab_size, group, reduce_input_grad, settings
    )
