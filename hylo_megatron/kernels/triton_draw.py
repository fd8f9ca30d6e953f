"""``draw.draw`` in one Triton kernel, a program per row. The nucleus is found without sorting the vocabulary."""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 4096
ONE = 0x3F800000  # bits of 1.0; bits of fp32 numbers of 0 and more are ordered as the numbers are


@triton.jit
def _weights(row_ptr, start, size, highest, inverse, BLOCK: tl.constexpr):
    """Return ``exp`` of a block's scaled logits, relative to the row's highest one."""
    at = start + tl.arange(0, BLOCK)
    logits = tl.load(row_ptr + at, mask=at < size, other=-float("inf")).to(tl.float32)
    return tl.exp((logits - highest) * inverse)


@triton.jit
def _mass(row_ptr, size, highest, inverse, least, BLOCK: tl.constexpr):
    """Return the sum of all weights of at least ``least``."""
    total = 0.0
    for start in range(0, size, BLOCK):
        weight = _weights(row_ptr, start, size, highest, inverse, BLOCK)
        total += tl.sum(tl.where(weight >= least, weight, 0.0), 0)
    return total


@triton.jit
def _draw(logits_ptr, uniform_ptr, out_ptr, size, stride, inverse, top_p, NUCLEUS: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * stride
    highest = -float("inf")
    for start in range(0, size, BLOCK):
        at = start + tl.arange(0, BLOCK)
        logits = tl.load(row_ptr + at, mask=at < size, other=-float("inf")).to(tl.float32)
        highest = tl.maximum(highest, tl.max(logits, 0))
    least = 1e-30  # of the highest weight; less is never drawn
    if NUCLEUS:  # bisect on the bits of the smallest weight in the nucleus
        wanted = _mass(row_ptr, size, highest, inverse, 0.0, BLOCK) * top_p
        low, high = 0, 0x3F800001
        for _ in range(31):
            middle = (low + high) // 2
            enough = _mass(row_ptr, size, highest, inverse, middle.to(tl.float32, bitcast=True), BLOCK) >= wanted
            low, high = tl.where(enough, middle, low), tl.where(enough, high, middle)
        least = tl.maximum(low.to(tl.float32, bitcast=True), least)
    target = tl.load(uniform_ptr + row) * _mass(row_ptr, size, highest, inverse, least, BLOCK)
    passed, found, last = 0.0, size, 0
    for start in range(0, size, BLOCK):
        weight = _weights(row_ptr, start, size, highest, inverse, BLOCK)
        kept = weight >= least
        weight = tl.where(kept, weight, 0.0)
        at = start + tl.arange(0, BLOCK)
        beyond = kept & (passed + tl.cumsum(weight, 0) > target)
        found = tl.minimum(found, tl.min(tl.where(beyond, at, size), 0))
        last = tl.maximum(last, tl.max(tl.where(kept, at, 0), 0))
        passed += tl.sum(weight, 0)
    tl.store(out_ptr + row, tl.where(found < size, found, last).to(tl.int64))  # rounding may leave none beyond


def draw(logits_BV: Tensor, uniform_B: Tensor, temperature: float, top_p: float) -> Tensor:
    """Return token ids [B], as ``draw.draw`` does."""
    rows, size = logits_BV.shape
    out = torch.empty(rows, dtype=torch.int64, device=logits_BV.device)
    _draw[(rows,)](
        logits_BV, uniform_B, out, size, logits_BV.stride(0), 1 / temperature, top_p,
        NUCLEUS=top_p < 1, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    return out
