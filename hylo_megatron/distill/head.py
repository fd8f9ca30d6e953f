"""A loss of logits from hidden states, chunk by chunk: no matrix of tokens by vocabulary ever exists.

Legend: T tokens, D student width, C teacher width, N vocabulary rows of this tensor-parallel rank. Both heads are
split by vocabulary. Each chunk of tokens needs two all-reduces per model for the softmax (maximum and sum), and one
each for the divergence and the label's logit. The extra memory is a few ``[chunk, N]`` tensors for any T. Gradients
are computed in the forward pass, from the same products. ``loss`` is a ``KL`` of ``losses/kl.py``, which calls
``chunked_loss``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config.decisions import token_chunks
from hylo_megatron.kernels.chunked import compute_dtype
from hylo_megatron.kernels.norm import wide


@dataclass(frozen=True, kw_only=True)
class HeadInputs:
    """Final hidden states of both models, both heads, and the tokens of a micro-batch, all on one rank.

    ``t_TC`` may have fewer rows than ``h_TD``: the teacher has read the first tokens only, and the others have weight
    zero in the divergence. Rows of the heads from ``vocab_size`` on are padding. ``reduce_input_grad`` says to sum the
    gradient of ``h_TD`` over ``group``; under sequence parallelism the gather of ``h_TD`` does that. ``late``: see
    ``KL.token_weights``.
    """

    h_TD: Tensor
    head_ND: Tensor
    t_TC: Tensor
    teacher_head_NC: Tensor
    labels_T: Tensor
    mask_T: Tensor
    position_T: Tensor
    answer_weight_T: Tensor | None = None
    vocab_size: int
    group: dist.ProcessGroup | None = None
    reduce_input_grad: bool = True
    late: Tensor | None = None

    def __post_init__(self):
        rows = len(self.head_ND), len(self.teacher_head_NC)
        if rows[0] != rows[1]:
            raise ValueError(f"heads of {rows[0]} and {rows[1]} rows on a rank: pad both to one size")


@dataclass(frozen=True, kw_only=True)
class TokenWeights:
    """Label, loss mask and weights of each token; ``weights[rows]`` has those of a chunk."""

    labels_T: Tensor
    mask_T: Tensor
    kl_T: Tensor
    ce_T: Tensor

    def __getitem__(self, rows: slice) -> TokenWeights:
        return TokenWeights(
            labels_T=self.labels_T[rows], mask_T=self.mask_T[rows], kl_T=self.kl_T[rows], ce_T=self.ce_T[rows]
        )


def token_weights(inputs: HeadInputs, loss) -> TokenWeights:
    mask_T = inputs.mask_T.float()
    kl_T, ce_T = loss.token_weights(inputs.position_T, mask_T, inputs.answer_weight_T, inputs.late)
    return TokenWeights(labels_T=inputs.labels_T, mask_T=mask_T, kl_T=kl_T, ce_T=ce_T)


class Shard:
    """The vocabulary rows of this rank: masks padding, and sums over the group."""

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
        """Return the log softmax over the whole vocabulary, computed in place. Padded columns become -inf."""
        logits_TN[:, self.valid :] = -torch.inf
        top = logits_TN.amax(-1, keepdim=True) if self.valid else logits_TN.new_full((len(logits_TN), 1), -torch.inf)
        logits_TN -= self.max(top)
        return logits_TN.sub_(self.sum(logits_TN.exp().sum(-1, keepdim=True)).log_())

    def pick(self, x_TN: Tensor, labels_T: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return ``x`` at the labels (of all ranks), whether a label is a row of this rank, and its column here."""
        column = labels_T - self.first
        here = (column >= 0) & (column < self.valid)
        column = column.clamp(0, max(0, x_TN.shape[1] - 1))
        value = x_TN.gather(1, column[:, None])[:, 0].masked_fill(~here, 0.0)
        return self.sum(value), here, column


def torch_chunk(student_TN: Tensor, teacher_TN: Tensor | None, weights: TokenWeights, shard: Shard, loss):
    """Return divergence ``[T]``, cross-entropy ``[T]`` and the gradient by the student's logits ``[T, N]``.

    Without the teacher's logits the divergence is zero.
    """
    logits_TN, gradient_TN = wide(student_TN), None
    kl_T = logits_TN.new_zeros(len(logits_TN))
    if teacher_TN is not None:
        log_s = shard.log_softmax(logits_TN / loss.temperature)
        log_t = shard.log_softmax(wide(teacher_TN) / loss.temperature)
        kl_T, gradient_TN = loss.divergence(log_s, log_t, shard)
        gradient_TN *= weights.kl_T[:, None] * loss.temperature  # temperature² of the loss over that of the logits
        kl_T = kl_T * loss.temperature**2
        del log_t
    log_p = log_s if teacher_TN is not None and loss.temperature == 1.0 else shard.log_softmax(logits_TN)
    value_T, here, column = shard.pick(log_p, weights.labels_T)
    p_TN = log_p.exp().mul_(weights.ce_T[:, None])
    own_T = (weights.ce_T * here).to(p_TN.dtype)  # no shape may depend on `here`: a CUDA graph cannot capture that
    p_TN.scatter_add_(1, column[:, None], -own_T[:, None])
    return kl_T, -value_T, p_TN if gradient_TN is None else gradient_TN.add_(p_TN)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, h_TD: Tensor, head_ND: Tensor, inputs: HeadInputs, weights: TokenWeights, loss):
        shard = Shard(head_ND.shape[0], inputs.vocab_size, inputs.group)
        need_h, need_head = h_TD.requires_grad, head_ND.requires_grad
        grad_h = torch.zeros_like(h_TD) if need_h else None
        exact = dict(dtype=compute_dtype(h_TD), device=h_TD.device)
        grad_head = torch.zeros(head_ND.shape, **exact) if need_head else None
        sums = torch.zeros(3, **exact)
        run_chunk = loss.fused_chunk(h_TD) or torch_chunk
        for rows, taught in token_chunks(len(h_TD), len(inputs.t_TC) if loss.compares else 0, loss.chunk):
            teacher_TN = F.linear(inputs.t_TC[rows], inputs.teacher_head_NC) if taught else None
            w = weights[rows]
            kl_T, ce_T, gradient_TN = run_chunk(F.linear(h_TD[rows], head_ND), teacher_TN, w, shard, loss)
            kl, ce = (kl_T * w.mask_T * (w.kl_T > 0)).sum(), (ce_T * w.mask_T).sum()
            sums += torch.stack([(kl_T * w.kl_T + ce_T * w.ce_T).sum(), kl, ce])
            gradient_TN = gradient_TN.to(h_TD.dtype)
            if need_h:
                grad_h[rows] = gradient_TN @ head_ND
            if need_head:
                grad_head += gradient_TN.T @ h_TD[rows]
        if need_h and inputs.reduce_input_grad:
            shard.sum(grad_h)
        ctx.save_for_backward(grad_h, None if grad_head is None else grad_head.to(head_ND.dtype))
        loss_sum, kl, ce = sums.unbind()
        ctx.mark_non_differentiable(kl, ce)
        return loss_sum.clone(), kl, ce

    @staticmethod
    def backward(ctx, grad, *_):
        grad_h, grad_head = ctx.saved_tensors
        return *(None if g is None else g * grad.to(g.dtype) for g in (grad_h, grad_head)), None, None, None


def chunked_loss(inputs: HeadInputs, loss) -> Tensor:
    """Return ``[loss, divergence, cross-entropy]``: sums over this rank's tokens.

    The first is weighted by token and has a gradient. The other two are for the log: they count the tokens of the loss
    mask.
    """
    return torch.stack(_HeadLoss.apply(inputs.h_TD, inputs.head_ND, inputs, token_weights(inputs, loss), loss))
