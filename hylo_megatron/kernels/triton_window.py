"""``window_cache.TokenPlan`` in one Triton kernel, with a program for each request and key head.

A program reads the request's places once. The new token's keys and values take the place of what its place held, and
the program writes them there. No mask is made, because a place's number and the position tell what the place holds.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

PLACES = 64  # that a program reads at once


@triton.jit
def _decode(near_ptr, far_ptr, kv_ptr, cache_ptr, at_ptr, slot_ptr, out_ptr, slot_r, cache_m, scale,
            SIZE: tl.constexpr, SINKS: tl.constexpr, SHARED: tl.constexpr, DIM: tl.constexpr,
            QUERIES: tl.constexpr, WIDTH: tl.constexpr, PLACES: tl.constexpr):  # fmt: skip
    r, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_ptr + r * slot_r).to(tl.int64)
    if slot <= 0:  # padding of a CUDA graph: vLLM gives the first slot to no request
        return
    at = tl.load(at_ptr + r).to(tl.int32)
    place = tl.where(at < SINKS, at, SINKS + at % SIZE)
    head = r * tl.num_programs(1) + g
    cache_ptr += slot * cache_m + g * (SINKS + SIZE) * 2 * DIM
    h, c, n = tl.arange(0, QUERIES), tl.arange(0, WIDTH), tl.arange(0, PLACES)
    # the new token
    inside = c < DIM
    new_k = tl.load(kv_ptr + head * 2 * DIM + c, mask=inside, other=0.0).to(cache_ptr.dtype.element_ty)
    new_v = tl.load(kv_ptr + head * 2 * DIM + DIM + c, mask=inside, other=0.0).to(cache_ptr.dtype.element_ty)
    tl.store(cache_ptr + place * 2 * DIM + c, new_k, mask=inside)
    tl.store(cache_ptr + place * 2 * DIM + DIM + c, new_v, mask=inside)
    own = (h < SHARED)[:, None] & inside[None, :]
    queries = (head * SHARED + h[:, None]) * DIM + c[None, :]
    near = tl.load(near_ptr + queries, mask=own, other=0.0)
    far = tl.load(far_ptr + queries, mask=own, other=0.0)
    # all places; the first one always holds a token that the new one sees
    top, total = tl.full([QUERIES], -float("inf"), tl.float32), tl.zeros([QUERIES], tl.float32)
    out = tl.zeros([QUERIES, WIDTH], tl.float32)
    for start in range(0, SINKS + SIZE, PLACES):
        row = start + n
        held = at - (at + SINKS + SIZE - row) % SIZE  # in the ring
        seen = (row < SINKS + SIZE) & tl.where(row < SINKS, row <= at, held >= SINKS)
        is_new = (row == place)[:, None]
        rows = cache_ptr + row[:, None] * 2 * DIM + c[None, :]
        old = (seen[:, None] & inside[None, :]) & (row != place)[:, None]
        k, v = tl.load(rows, mask=old, other=0.0), tl.load(rows + DIM, mask=old, other=0.0)
        k = tl.where(is_new, new_k[None, :], k).to(near.dtype)
        v = tl.where(is_new, new_v[None, :], v).to(near.dtype)
        score = tl.dot(near, tl.trans(k), input_precision="ieee")
        if SINKS > 0:
            score = tl.where((row < SINKS)[None, :], tl.dot(far, tl.trans(k), input_precision="ieee"), score)
        score = tl.where(seen[None, :], score * scale, -float("inf"))
        highest = tl.maximum(top, tl.max(score, 1))
        share, before = tl.exp(score - highest[:, None]), tl.exp(top - highest)
        total = total * before + tl.sum(share, 1)
        out = out * before[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
        top = highest
    tl.store(out_ptr + queries, (out / total[:, None]).to(out_ptr.dtype.element_ty), mask=own)


def decode(near_RHK: Tensor, far_RHK: Tensor, kv_RGY: Tensor, cache_MGCY: Tensor, at_R: Tensor, slot_R: Tensor,
           window: dict, out_RHK: Tensor) -> None:  # fmt: skip
    """Write the tokens' keys and values into ``cache``, and the attention into ``out``, except for slots below 1."""
    (requests, heads, dim), groups = near_RHK.shape, kv_RGY.shape[1]
    size, sinks = window["size"], window["sinks"]
    widths = (max(16, triton.next_power_of_2(n)) for n in (heads // groups, dim))
    given = near_RHK.contiguous(), far_RHK.contiguous(), kv_RGY.contiguous(), cache_MGCY, at_R, slot_R, out_RHK
    with torch.no_grad():
        _decode[(requests, groups)](
            *given, slot_R.stride(0), cache_MGCY.stride(0), dim**-0.5, size, sinks, heads // groups, dim, *widths,
            PLACES, num_warps=4 if dim <= 64 else 8,
        )  # fmt: skip
