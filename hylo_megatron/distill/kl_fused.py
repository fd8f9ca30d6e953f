"""One chunk of the forward KL in two Triton kernels: logits are read twice, and the gradient overwrites them.

``head.torch_chunk`` is the reference; a test compares the two in Triton's interpreter. Legend: T tokens, N vocabulary
rows of this rank.
"""

import functools

import torch
from torch import Tensor

BLOCK = 4096


@functools.lru_cache
def _kernels():
    import triton
    import triton.language as tl

    @triton.jit
    def statistics(x_ptr, top_ptr, sum_ptr, stride, valid, BLOCK: tl.constexpr):
        """Maximum of a row, and sum of exp(x - maximum)."""
        row = tl.program_id(0).to(tl.int64)
        top = tl.full((), -float("inf"), tl.float32)
        total = tl.zeros((), tl.float32)
        for start in range(0, valid, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            x = tl.load(x_ptr + row * stride + columns, mask=columns < valid, other=-float("inf")).to(tl.float32)
            higher = tl.maximum(top, tl.max(x, 0))
            total = total * tl.exp(top - higher) + tl.sum(tl.exp(x - higher), 0)
            top = higher
        tl.store(top_ptr + row, top)
        tl.store(sum_ptr + row, total)

    @triton.jit
    def gradient(s_ptr, t_ptr, norm_s_ptr, norm_t_ptr, label_ptr, wk_ptr, wc_ptr, kl_ptr, value_ptr, stride_s,
                 stride_t, columns_all, valid, TAUGHT: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
        """Sum of p_t (log p_t - log p_s), and log p_s at the label. The gradient overwrites the student's logits."""
        row = tl.program_id(0).to(tl.int64)
        norm_s, label, wc = tl.load(norm_s_ptr + row), tl.load(label_ptr + row), tl.load(wc_ptr + row)
        kl, value = tl.zeros((), tl.float32), tl.zeros((), tl.float32)
        for start in range(0, columns_all, BLOCK):
            columns = start + tl.arange(0, BLOCK)
            inside = columns < valid
            log_s = tl.load(s_ptr + row * stride_s + columns, mask=inside, other=0.0).to(tl.float32) - norm_s
            at_label = (columns == label) & inside
            value += tl.sum(tl.where(at_label, log_s, 0.0), 0)
            p_s = tl.where(inside, tl.exp(log_s), 0.0)
            grad = wc * p_s - tl.where(at_label, wc, 0.0)
            if TAUGHT:
                log_t = tl.load(t_ptr + row * stride_t + columns, mask=inside, other=0.0).to(tl.float32)
                log_t -= tl.load(norm_t_ptr + row)
                p_t = tl.where(inside, tl.exp(log_t), 0.0)
                kl += tl.sum(p_t * (log_t - log_s), 0)
                grad += tl.load(wk_ptr + row) * (p_s - p_t)
            tl.store(s_ptr + row * stride_s + columns, grad.to(s_ptr.dtype.element_ty), mask=columns < columns_all)
        tl.store(kl_ptr + row, kl)
        tl.store(value_ptr + row, value)

    return statistics, gradient


def fits(h_TD: Tensor) -> bool:
    """Whether the kernels run: on a GPU. ``KL.has_kernels`` says for which settings they are."""
    return h_TD.is_cuda


def _log_normaliser(logits_TN: Tensor, shard) -> Tensor:
    """Return ``logsumexp`` over the whole vocabulary, fp32 ``[T]``."""
    statistics, _ = _kernels()
    top, total = (torch.empty(len(logits_TN), dtype=torch.float32, device=logits_TN.device) for _ in range(2))
    statistics[(len(logits_TN),)](logits_TN, top, total, logits_TN.stride(0), shard.valid, BLOCK=BLOCK, num_warps=8)
    highest = shard.max(top.clone())
    return highest + shard.sum(total * (top - highest).exp()).log()


def chunk(student_TN: Tensor, teacher_TN: Tensor | None, weights, shard, loss):
    """Do what ``head.torch_chunk`` does. The gradient overwrites ``student_TN``."""
    _, gradient = _kernels()
    norm_s = _log_normaliser(student_TN, shard)
    taught = teacher_TN is not None
    norm_t = _log_normaliser(teacher_TN, shard) if taught else norm_s
    teacher = teacher_TN if taught else student_TN
    kl, value = torch.empty_like(norm_s), torch.empty_like(norm_s)
    gradient[(len(student_TN),)](
        student_TN, teacher, norm_s, norm_t, weights.labels_T - shard.first, weights.kl_T, weights.ce_T, kl, value,
        student_TN.stride(0), teacher.stride(0), student_TN.shape[1], shard.valid, TAUGHT=taught, BLOCK=BLOCK,
        num_warps=8,
    )  # fmt: skip
    return shard.sum(kl), -shard.sum(value), student_TN
