"""``KL``: KL divergence between teacher and student, and cross-entropy of the text.

Legend: T tokens, N vocabulary rows of a tensor-parallel rank. ``log_s`` and ``log_t`` are ``[T, N]``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hylo_megatron.config.decisions import token_chunks
from hylo_megatron.distill.losses.loss import Loss
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import positive, share, size, weight
from hylo_megatron.options import option

if TYPE_CHECKING:
    from torch import Tensor

    from hylo_megatron.config import Architecture
    from hylo_megatron.distill.head import HeadInputs, Shard


@dataclass(frozen=True, kw_only=True)
class HeadShape:
    """Sizes on one rank that determine the memory of a ``KL``. All tensors are bf16 unless noted."""

    tokens: int
    taught: int  # tokens that the teacher has read
    rows: int  # of the heads: vocabulary of a tensor-parallel rank, with padding
    width: int  # hidden size of the student
    teacher_width: int
    tp: int = 1
    sequence_parallel: bool = False
    head_trained: bool = True


@dataclass(frozen=True, kw_only=True)
class KL(Loss):
    """``kl_weight`` times the divergence plus ``ce_weight`` times the cross-entropy of the text.

    ``teacher_length`` is the context that the teacher was trained for (None: no limit). Beyond it the loss is
    ``ce_beyond`` times the cross-entropy. Before the share ``ce_from`` of the steps the divergence has both weights
    and cross-entropy none, except that of answers and beyond the teacher's length. ``reverse`` is the direction of the
    paper's formula; the paper's code computes the other one. A loss with another divergence derives from this class
    and replaces ``divergence``, ``parts`` and ``fp32_tensors``; the kernels are this divergence's only.
    """

    layerwise = False
    parts = ("loss", "kl", "ce")
    fp32_tensors = 8  # of the size of a chunk's logits, at the peak of ``head.torch_chunk``

    kl_weight: float = option("--hylo-kl-weight", 1.0, weight, "weight of the divergence from the teacher")
    ce_weight: float = option("--hylo-ce-weight", 0.0, weight, "weight of cross-entropy on the text")
    ce_from: float = option(
        "--hylo-ce-from",
        0.0,
        share,
        "share of the steps before which the divergence has both weights, cross-entropy none",
    )
    temperature: float = option("--hylo-temperature", 1.0, positive, "both models' logits are divided by it")
    reverse: bool = option("--hylo-reverse-kl", False, help="KL(student || teacher), the paper's formula")
    teacher_length: int | None = option(
        "--hylo-teacher-length", None, size, "positions below it learn from the teacher, the others from the text"
    )
    ce_beyond: float = option(
        "--hylo-ce-beyond-teacher", 1.0, weight, "weight of cross-entropy beyond --hylo-teacher-length"
    )
    hidden_weight: float = option(
        "--hylo-hidden-weight", 0.0, weight, "weight of the mean squared difference of final hidden states"
    )
    hidden_layers_weight: float = option(
        "--hylo-hidden-layers-weight", 0.0, weight, "the same for the hidden states after each layer, summed"
    )
    chunk: int = option("--hylo-kl-chunk", 1024, size, "tokens whose logits are in memory at once")

    def __post_init__(self):
        if self.distances:
            object.__setattr__(self, "parts", (*type(self).parts, *self.distances))

    @property
    def distances(self) -> dict[str, float]:
        """Weights above 0 of the distances between hidden states, by their names in the log."""
        named = {"hidden": self.hidden_weight, "hidden layers": self.hidden_layers_weight}
        return {name: value for name, value in named.items() if value}

    @property
    def compares(self) -> bool:
        """True if the divergence has a weight at any step."""
        return bool(self.kl_weight or (self.ce_from and self.ce_weight))

    def late_at(self, step: int, steps: int) -> bool:
        """Return whether cross-entropy has its weight at ``step`` of ``steps``, counted from 0."""
        return step >= round(self.ce_from * steps)

    @property
    def teacher_reads(self) -> int | None:
        return self.teacher_length

    def check(
        self, student: Architecture, teacher: Architecture, pp: int, recompute: bool, prefix: str = "--hylo-"
    ) -> None:
        flag = prefix + ("hidden-layers-weight" if self.hidden_layers_weight else "hidden-weight")
        if self.distances and student.hidden_size != teacher.hidden_size:
            widths = f"{student.hidden_size} and {teacher.hidden_size}"
            raise HyLoError(f"{flag}: student and teacher are {widths} wide, expected one width; leave the flag out")
        if self.hidden_layers_weight and student.num_layers != teacher.num_layers:
            layers = f"{student.num_layers} and {teacher.num_layers}"
            raise HyLoError(f"{flag}: student and teacher have {layers} layers, expected as many; leave the flag out")
        if self.hidden_layers_weight and (pp > 1 or recompute):
            raise HyLoError(
                f"{flag}: the states of all layers are needed, so neither pipeline stages nor recompute work"
            )

    def token_counts(self, mask: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
        counts = super().token_counts(mask, position_ids)
        if self.teacher_length:  # the divergence is a mean over tokens that have a teacher
            taught = (mask * (position_ids < self.teacher_length)).sum().float()
            counts |= dict.fromkeys((self.parts[1], *self.distances), taught)
        return counts

    def token_weights(self, position: Tensor, mask: Tensor, answer_weight: Tensor | None,
                      late: Tensor | None = None) -> tuple[Tensor, Tensor]:  # fmt: skip
        """Weights of divergence and cross-entropy of each token, in the shape of ``position``.

        ``position`` is the token's place in its sequence. ``answer_weight`` is added to the weight of cross-entropy
        where a token belongs to an answer. ``late`` is 1 or 0 as ``late_at`` (None: 1); a CUDA graph reads it anew in
        each step.
        """
        kl_weight, ce_weight = self.kl_weight, self.ce_weight
        if late is not None:
            kl_weight, ce_weight = kl_weight + ce_weight * (1 - late), ce_weight * late
        taught = mask.new_ones(mask.shape)
        if self.teacher_length is not None:
            taught = (position < self.teacher_length).to(mask.dtype)
        ce = ce_weight * taught + self.ce_beyond * (1 - taught)
        if answer_weight is not None:
            ce = ce + answer_weight
        return kl_weight * taught * mask, ce * mask

    def __call__(self, inputs: HeadInputs) -> Tensor:
        """Return one sum over tokens for each of ``parts``, of which the first is ``loss``."""
        from hylo_megatron.distill.head import chunked_loss

        return chunked_loss(inputs, self)

    @property
    def has_kernels(self) -> bool:
        """True if a GPU computes these settings by ``kl_fused``, False if by ``head.torch_chunk``."""
        return type(self).divergence is KL.divergence and not self.reverse and self.temperature == 1.0

    def fused_chunk(self, h_TD: Tensor) -> Callable | None:
        """Kernels for these settings on the device of ``h_TD``, with the signature of ``head.torch_chunk``."""
        from hylo_megatron.distill import kl_fused

        return kl_fused.chunk if self.has_kernels and kl_fused.fits(h_TD) else None

    def divergence(self, log_s: Tensor, log_t: Tensor, shard: Shard) -> tuple[Tensor, Tensor]:
        """Divergence of each token over the whole vocabulary, and its gradient by the student's logits ``[T, N]``.

        ``log_s`` and ``log_t`` are this rank's log-probabilities, -inf in padded columns.
        """
        p_s = log_s.exp()
        difference = (log_s - log_t).nan_to_num_(0.0)  # -inf - -inf in padded columns
        if self.reverse:
            kl_T = shard.sum((p_s * difference).sum(-1))
            return kl_T, p_s.mul_(difference.sub_(kl_T[:, None]))
        p_t = log_t.exp()
        kl_T = shard.sum(-(p_t * difference).sum(-1))
        return kl_T, p_s.sub_(p_t)

    def memory(self, shape: HeadShape) -> int:
        """Return the bytes at the peak of this loss, beside weights and activations of the layers.

        Counts hidden states of both models, the gradient of the student's, the fp32 gradient of its head, and logits.
        """
        d, c = shape.width, shape.teacher_width
        states = 2 * (2 * shape.tokens * d + shape.taught * c)
        if shape.sequence_parallel:  # the shards that the states were gathered from
            states += 2 * shape.tokens * d // shape.tp + 2 * shape.taught * c // shape.tp
        logits = 2 * shape.rows * logit_rows(shape.tokens, shape.taught, self.chunk)
        if not self.has_kernels:
            logits += 4 * self.fp32_tensors * shape.rows * min(self.chunk, shape.tokens)
        if self.hidden_weight:  # the difference in fp32, and its square or its gradient
            states += 2 * 4 * shape.taught * d
        if not shape.head_trained:
            return states + logits
        # A chunk's gradient by its logits, once transposed, and the product that is added to the head's gradient.
        product = 2 * shape.rows * (2 * min(self.chunk, shape.tokens) + d)
        return states + 4 * shape.rows * d + max(logits, product)


def logit_rows(tokens: int, taught: int, chunk: int) -> int:
    """Largest number of rows of logits in memory at once.

    ``chunked_loss`` frees a chunk's teacher and student logits when those of the next chunk take their variables.
    """
    teacher = student = most = 0
    for span, has_teacher in token_chunks(tokens, taught, chunk):
        rows = span.stop - span.start
        if has_teacher:
            most = max(most, teacher + student + rows)
        teacher = rows if has_teacher else 0
        most = max(most, teacher + student + rows)
        student = rows
    return most
