"""The joining of two blocks of attention (``attention.join_attention``) in one pass over both.

Legend: B batch, H heads, S queries, V value width.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

QUERIES = 32


@triton.jit
def _join(out_ptr, lse_ptr, joined_lse_ptr, part_ptr, part_lse_ptr, heads, length, width, out_b, out_h, out_s,
          lse_b, lse_h, part_b, part_h, part_s, part_lse_b, part_lse_h,
          QUERIES: tl.constexpr, WIDTH: tl.constexpr):  # fmt: skip
    b, h = (tl.program_id(1) // heads).to(tl.int64), (tl.program_id(1) % heads).to(tl.int64)
    s = (tl.program_id(0) * QUERIES + tl.arange(0, QUERIES)).to(tl.int64)
    c = tl.arange(0, WIDTH)
    lse_at, new_at = lse_ptr + b * lse_b + h * lse_h + s, part_lse_ptr + b * part_lse_b + h * part_lse_h + s
    lse, new = tl.load(lse_at, mask=s < length, other=0.0), tl.load(new_at, mask=s < length, other=0.0)
    top = tl.maximum(lse, new)
    before, after = tl.exp(lse - top), tl.exp(new - top)
    total = before + after
    # Not in place: every warp reads all denominators of a program, one of them later than another one writes.
    tl.store(joined_lse_ptr + tl.program_id(1).to(tl.int64) * length + s, top + tl.log(total), mask=s < length)
    inside = (s < length)[:, None] & (c < width)[None, :]
    out_at = out_ptr + b * out_b + h * out_h + s[:, None] * out_s + c[None, :]
    part_at = part_ptr + b * part_b + h * part_h + s[:, None] * part_s + c[None, :]
    out = tl.load(out_at, mask=inside, other=0.0).to(tl.float32)
    part = tl.load(part_at, mask=inside, other=0.0).to(tl.float32)
    joined = out * (before / total)[:, None] + part * (after / total)[:, None]
    tl.store(out_at, joined.to(out_ptr.dtype.element_ty), mask=inside)


def join_attention(out: Tensor, lse: Tensor, part: Tensor, part_lse: Tensor) -> None:
    """Compute ``attention.join_attention``."""
    batch, heads, length, width = out.shape
    strides = (*out.stride()[:3], *lse.stride()[:2], *part.stride()[:3], *part_lse.stride()[:2])
    grid = (triton.cdiv(length, QUERIES), batch * heads)
    widest = triton.next_power_of_2(width)
    with torch.no_grad():
        joined_lse = lse.new_empty(lse.shape)
        _join[grid](out, lse, joined_lse, part, part_lse, heads, length, width, *strides, QUERIES, widest, num_warps=4)
        lse.copy_(joined_lse)
