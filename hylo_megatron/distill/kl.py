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

from hylo_megatron.distill import kl_fused
from hylo_megatron.kernels.chunked import compute_dtype
from hylo_megatron.kernels.norm import wide


@dataclass(frozen=True)
class KLSettings:
    """``reverse``: KL(student ‖ teacher), the direction of the paper's formula; its code computes the other one.

    ``teacher_length``: positions at which the teacher is worth listening to (its own context); beyond, the loss is
    ``ce_beyond`` times the cross-entropy of the text. None: everywhere.
    """

    kl_weight: float = 1.0
    ce_weight: float = 0.0
    temperature: float = 1.0
    reverse: bool = False
    chunk: int = 1024
    teacher_length: int | None = None
    ce_beyond: float = 1.0


def token_weights(s: KLSettings, position: Tensor, mask: Tensor, answer_weight: Tensor | None = None):
    """``(kl weight, ce weight)`` of each token, fp32, in the shape of ``position``, its place in the sequence.

    ``answer_weight`` is added to the cross-entropy's wherever a token answers a question.
    """
    taught = torch.ones_like(mask) if s.teacher_length is None else (position < s.teacher_length).to(mask.dtype)
    ce = s.ce_weight * taught + s.ce_beyond * (1 - taught)
    if answer_weight is not None:
        ce = ce + answer_weight
    return s.kl_weight * taught * mask, ce * mask


def reference_loss(student_TN: Tensor, teacher_TN: Tensor, labels_T: Tensor, mask_T: Tensor, kl_weight_T: Tensor,
                   ce_weight_T: Tensor, s: KLSettings) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """The same loss from whole logits, a few lines: what the chunked one must equal. Sums over tokens."""
    log_s, log_t = ((x / s.temperature).log_softmax(-1) for x in (student_TN, teacher_TN))
    log_p, log_q = (log_s, log_t) if s.reverse else (log_t, log_s)
    kl = (log_p.exp() * (log_p - log_q)).sum(-1) * s.temperature**2
    ce = F.cross_entropy(student_TN, labels_T, reduction="none")
    loss = (kl * kl_weight_T + ce * ce_weight_T).sum()
    return loss, (kl * mask_T * (kl_weight_T > 0)).sum().detach(), (ce * mask_T).sum().detach()


class Shard:
    """The vocabulary rows of this rank: padding masked out, sums taken over the group."""

    def __init__(self, rows: int, vocab_size: int, group):
        self.group = group if group is not None and group.size() > 1 else None
        self.first = rows * (group.rank() if self.group else 0)
        self.valid = max(0, min(rows, vocab_size - self.first))

    def sum(self, x: Tensor) -> Tensor:
        if self.group:
            dist.all_reduce(x, group=self.group)
        return x

    def max(self, x: Tensor) -> Tensor:
        if self.group:
            dist.all_reduce(x, dist.ReduceOp.MAX, group=self.group)
        return x

    def log_softmax(self, logits_TN: Tensor) -> Tensor:
        """In place, over the whole vocabulary; padded columns become -inf."""
        logits_TN[:, self.valid :] = -torch.inf
        top = logits_TN.amax(-1, keepdim=True) if self.valid else logits_TN.new_full((len(logits_TN), 1), -torch.inf)
        logits_TN -= self.max(top)
        return logits_TN.sub_(self.sum(logits_TN.exp().sum(-1, keepdim=True)).log_())

    def pick(self, x_TN: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``x`` at the labels (summed over ranks), which rows hold theirs here, and at which column."""
        column = labels_T - self.first
        here = (column >= 0) & (column < self.valid)
        column = column.clamp(0, max(0, x_TN.shape[1] - 1))
        value = x_TN.gather(1, column[:, None])[:, 0].masked_fill(~here, 0.0)
        return self.sum(value), here, column


def _kl_and_gradient(log_s: Tensor, log_t: Tensor, shard: Shard, reverse: bool) -> tuple[Tensor, Tensor]:
    """Per-token KL over the whole vocabulary and its gradient by the student's (tempered) logits, ``[T, N]``."""
    p_s = log_s.exp()
    difference = (log_s - log_t).nan_to_num_(0.0)  # -inf - -inf in padded columns
    if reverse:
        kl = shard.sum((p_s * difference).sum(-1))
        return kl, p_s.mul_(difference.sub_(kl[:, None]))
    p_t = log_t.exp()
    kl = shard.sum(-(p_t * difference).sum(-1))
    return kl, p_s.sub_(p_t)


def torch_chunk(student_TN: Tensor, teacher_TN: Tensor | None, labels_T, kl_weight_T, ce_weight_T, shard, s):
    """``(kl_T, ce_T, gradient by the student's logits [T, N])`` of one chunk; without teacher logits kl is zero."""
    logits, gradient = wide(student_TN), None
    kl_T = logits.new_zeros(len(logits))
    if teacher_TN is not None:
        log_s = shard.log_softmax(logits / s.temperature)
        log_t = shard.log_softmax(wide(teacher_TN) / s.temperature)
        kl_T, gradient = _kl_and_gradient(log_s, log_t, shard, s.reverse)
        gradient *= kl_weight_T[:, None] * s.temperature  # T² of the loss over T of the logits
        kl_T = kl_T * s.temperature**2
        del log_t
    log_p = log_s if teacher_TN is not None and s.temperature == 1.0 else shard.log_softmax(logits)
    value, here, column = shard.pick(log_p, labels_T)
    p = log_p.exp().mul_(ce_weight_T[:, None])
    p[here.nonzero()[:, 0], column[here]] -= ce_weight_T[here]
    return kl_T, -value, p if gradient is None else gradient.add_(p)


def _spans(tokens: int, taught: int, chunk: int) -> list[tuple[slice, bool]]:
    """Chunks of rows, and whether the teacher has hidden states for them (the first ``taught`` rows)."""
    cuts = [*range(0, taught, chunk), *range(taught, tokens, chunk), tokens]
    return [(slice(a, b), a < taught) for a, b in zip(cuts, cuts[1:], strict=False) if b > a]


class _HiddenStateKL(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TD, head_ND, t_TC, teacher_head_NC, labels_T, mask_T, kl_weight_T, ce_weight_T, vocab_size,
                group, reduce_input, s):  # fmt: skip
        shard = Shard(head_ND.shape[0], vocab_size, group)
        need_h, need_head = h_TD.requires_grad, head_ND.requires_grad
        grad_h = torch.zeros_like(h_TD) if need_h else None
        exact = dict(dtype=compute_dtype(h_TD), device=h_TD.device)
        grad_head = torch.zeros(head_ND.shape, **exact) if need_head else None
        sums = torch.zeros(3, **exact)
        run_chunk = kl_fused.chunk if kl_fused.fits(h_TD, s) else torch_chunk
        for rows, taught in _spans(len(h_TD), len(t_TC) if s.kl_weight else 0, s.chunk):
            teacher_TN = F.linear(t_TC[rows], teacher_head_NC) if taught else None
            kl_T, ce_T, gradient = run_chunk(
                F.linear(h_TD[rows], head_ND),
                teacher_TN,
                labels_T[rows],
                kl_weight_T[rows],
                ce_weight_T[rows],
                shard,
                s,
            )
            mask, wk, wc = mask_T[rows], kl_weight_T[rows], ce_weight_T[rows]
            sums += torch.stack([(kl_T * wk + ce_T * wc).sum(), (kl_T * mask * (wk > 0)).sum(), (ce_T * mask).sum()])
            gradient = gradient.to(h_TD.dtype)
            if need_h:
                grad_h[rows] = gradient @ head_ND
            if need_head:
                grad_head += gradient.T @ h_TD[rows]
        if need_h and reduce_input:
            shard.sum(grad_h)
        ctx.save_for_backward(grad_h, None if grad_head is None else grad_head.to(head_ND.dtype))
        loss, kl, ce = sums.unbind()
        ctx.mark_non_differentiable(kl, ce)
        return loss.clone(), kl, ce

    @staticmethod
    def backward(ctx, grad, *_):
        grad_h, grad_head = ctx.saved_tensors
        scaled = (None if g is None else g * grad.to(g.dtype) for g in (grad_h, grad_head))
        return *scaled, *([None] * 10)


def hidden_state_kl(h_TD: Tensor, head_ND: Tensor, t_TC: Tensor, teacher_head_NC: Tensor, labels_T: Tensor,
                    mask_T: Tensor, kl_weight_T: Tensor, ce_weight_T: Tensor, vocab_size: int, group=None,
                    reduce_input_grad: bool = True,
                    settings: KLSettings = KLSettings()) -> tuple[Tensor, Tensor, Tensor]:  # noqa: B008  # fmt: skip
    """``(loss, kl, ce)``: sums over this rank's tokens; the loss weighted by token, kl and ce only masked, for logs.

    ``t_TC`` may have fewer rows than ``h_TD``: the teacher's states of the first tokens, the others have none (and kl
    weight zero). ``reduce_input_grad``: sum ``h``'s gradient over the group here (False under sequence parallelism,
    where the gather before this call does it). Only ``loss`` has a gradient.
    """
    if len(head_ND) != len(teacher_head_NC):
        raise ValueError(f"heads of {len(head_ND)} and {len(teacher_head_NC)} rows on a rank: pad both to one size")
    return _HiddenStateKL.apply(h_TD, head_ND, t_TC, teacher_head_NC, labels_T, mask_T, kl_weight_T, ce_weight_T,
                                vocab_size, group, reduce_input_grad, settings)  # fmt: skip
