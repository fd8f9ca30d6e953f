"""The recurrence of a linear block over one segment of the sequence after another.

In their backward pass the kernels make a state for every 64 tokens again, its gradient, and several tensors as wide as
all heads. With segments these exist for one segment at a time, and the state passes from each to the next.
"""

from collections.abc import Callable, Iterable
from dataclasses import replace

import torch
from torch import Tensor

from hylo_megatron.kernels.choose import Ops, ops_for

RECURRENCES = ("chunk_gated_delta_rule", "chunk_kda")  # names in ``Ops`` of those that can run in segments


def in_segments(recurrence: Callable, length: int) -> Callable:
    """Return ``recurrence`` in segments of ``length`` tokens, a multiple of the kernels' 64.

    Packed sequences (``cu_seqlens``) and those no longer than a segment run at once.
    """

    def run(first: Tensor, *others, initial_state=None, output_final_state=False, **settings):
        def cut(x):
            per_token = isinstance(x, Tensor) and x.dim() > 2 and x.shape[:2] == first.shape[:2]
            return x.split(length, 1) if per_token else [x] * count

        if first.shape[1] <= length or settings.get("cu_seqlens") is not None:
            return recurrence(
                first, *others, initial_state=initial_state, output_final_state=output_final_state, **settings
            )
        count = -(-first.shape[1] // length)
        inputs = zip(*map(cut, (first, *others)), strict=True)
        named = [dict(zip(settings, values, strict=True)) for values in zip(*map(cut, settings.values()), strict=True)]
        outs, state = [], initial_state
        for number, (segment, rest) in enumerate(zip(inputs, named or [{}] * count, strict=True), 1):
            out, state = recurrence(
                *segment, **rest, initial_state=state, output_final_state=number < count or output_final_state
            )
            outs.append(out)
        return torch.cat(outs, 1), state

    return run


def segmented(names: Iterable[str], length: int) -> Callable[[Tensor], Ops]:
    """Return ``ops_for`` with the recurrences ``names`` in segments."""

    def choose(x: Tensor) -> Ops:
        local = ops_for(x)
        return replace(local, **{name: in_segments(getattr(local, name), length) for name in names})

    return choose
