"""SwiGLU, the distance of two hidden states, RMSNorm's gradient and rotary embeddings: one Triton kernel per
direction.

Results equal those of ``norm.py`` and ``rope.rotate``. Legend: T tokens, F width of the MLP, D width, P rotated pairs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from hylo_megatron.kernels import rope

ROWS, COLUMNS = 4, 512


@triton.jit
def _swiglu_forward(x_ptr, y_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (t < rows) & (c < width)
    gate = tl.load(x_ptr + t * 2 * width + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + t * 2 * width + width + c, mask=inside, other=0.0).to(tl.float32)
    tl.store(y_ptr + t * width + c, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _swiglu_backward(x_ptr, dy_ptr, dx_ptr, rows, width, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
    c = (tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS))[None, :]
    inside = (t < rows) & (c < width)
    gate = tl.load(x_ptr + t * 2 * width + c, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + t * 2 * width + width + c, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + t * width + c, mask=inside, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    d_gate, d_up = dy * up * sigmoid * (1 + gate * (1 - sigmoid)), dy * gate * sigmoid
    tl.store(dx_ptr + t * 2 * width + c, d_gate.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dx_ptr + t * 2 * width + width + c, d_up.to(dx_ptr.dtype.element_ty), mask=inside)


class _SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        y = torch.empty(*x.shape[:-1], x.shape[-1] // 2, dtype=x.dtype, device=x.device)
        rows, width = y.numel() // y.shape[-1], y.shape[-1]
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
        _swiglu_forward[grid](x, y, rows, width, ROWS, COLUMNS, num_warps=4)
        ctx.save_for_backward(x)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y):
        (x,) = ctx.saved_tensors
        d_x, width = torch.empty_like(x), x.shape[-1] // 2
        rows = x.numel() // (2 * width)
        grid = (triton.cdiv(rows, ROWS), triton.cdiv(width, COLUMNS))
        _swiglu_backward[grid](x, d_y.contiguous(), d_x, rows, width, ROWS, COLUMNS, num_warps=4)
        return d_x


def swiglu_packed(x: Tensor) -> Tensor:
    """Compute ``norm.swiglu_packed``."""
    return _SwiGLU.apply(x.contiguous())


@triton.jit
def _distance_forward(a_ptr, b_ptr, out_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + row * width + c, mask=c < width, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * width + c, mask=c < width, other=0.0).to(tl.float32)
    tl.store(out_ptr + row, tl.sqrt(tl.sum((a - b) * (a - b), 0)))


@triton.jit
def _distance_backward(a_ptr, b_ptr, out_ptr, d_out_ptr, d_a_ptr, width, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, BLOCK)
    a = tl.load(a_ptr + row * width + c, mask=c < width, other=0.0).to(tl.float32)
    b = tl.load(b_ptr + row * width + c, mask=c < width, other=0.0).to(tl.float32)
    out = tl.load(out_ptr + row)
    scale = tl.where(out > 0, tl.load(d_out_ptr + row) / out, 0.0)
    tl.store(d_a_ptr + row * width + c, ((a - b) * scale).to(d_a_ptr.dtype.element_ty), mask=c < width)


class _Distance(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a, b):
        out = torch.empty(a.shape[:-1], dtype=torch.float32, device=a.device)
        ctx.block = triton.next_power_of_2(a.shape[-1])
        _distance_forward[(out.numel(),)](a, b, out, a.shape[-1], ctx.block, num_warps=4)
        ctx.save_for_backward(a, b, out)
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out):
        a, b, out = ctx.saved_tensors
        d_a = torch.empty_like(a)
        _distance_backward[(out.numel(),)](a, b, out, d_out.contiguous(), d_a, a.shape[-1], ctx.block, num_warps=4)
        return d_a, None


def distance(a: Tensor, b: Tensor) -> Tensor:
    """Compute ``norm.distance``; only ``a`` has a gradient."""
    return _Distance.apply(a.contiguous(), b.detach().contiguous())


@triton.jit
def _norm_backward(x_ptr, w_ptr, dy_ptr, dx_ptr, dw_ptr, rows, width, eps, ROWS: tl.constexpr, TILES: tl.constexpr,
                   BLOCK: tl.constexpr):  # fmt: skip
    """Write both gradients of RMSNorm; dw [programs, D] in parts."""
    c = tl.arange(0, BLOCK)
    here = c < width
    w = tl.load(w_ptr + c, mask=here, other=0.0).to(tl.float32)
    d_w = tl.zeros((BLOCK,), tl.float32)
    for tile in range(TILES):
        t = ((tl.program_id(0) * TILES + tile) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None]
        inside = (t < rows) & here[None, :]
        x = tl.load(x_ptr + t * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + t * width + c[None, :], mask=inside, other=0.0).to(tl.float32)
        scale = 1 / tl.sqrt(tl.sum(x * x, 1) / width + eps)
        x *= scale[:, None]
        d_w += tl.sum(dy * x, 0)
        dy *= w[None, :]
        d_x = (dy - x * (tl.sum(dy * x, 1) / width)[:, None]) * scale[:, None]
        tl.store(dx_ptr + t * width + c[None, :], d_x.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + tl.program_id(0).to(tl.int64) * width + c, d_w, mask=here)


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, eps):
        ctx.eps = eps
        ctx.save_for_backward(x, weight)
        return torch.nn.functional.rms_norm(x, x.shape[-1:], weight, eps)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y):
        x, weight = ctx.saved_tensors
        d_x, width, tiles = torch.empty_like(x), x.shape[-1], 8
        block = triton.next_power_of_2(width)
        rows, tile = x.numel() // width, max(1, 4096 // block)
        programs = triton.cdiv(rows, tile * tiles)
        parts = torch.empty(programs, width, dtype=torch.float32, device=x.device)
        _norm_backward[(programs,)](x, weight, d_y.contiguous(), d_x, parts, rows, width, ctx.eps, tile, tiles, block,
                                    num_warps=4)  # fmt: skip
        return d_x, parts.sum(0).to(weight.dtype), None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Compute ``norm.rms_norm`` for a trained weight, whose gradient is slow in torch."""
    return _RMSNorm.apply(x.contiguous(), weight, eps)


@triton.jit
def _rotate(x_ptr, cos_ptr, sin_ptr, y_ptr, rows, batch, heads, stride_s, stride_b, stride_h, sign,
            PAIRS: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr):  # fmt: skip
    t = (tl.program_id(0) * ROWS + tl.arange(0, ROWS)).to(tl.int64)[:, None, None]
    h = tl.arange(0, HEADS).to(tl.int64)[None, :, None]
    p = tl.arange(0, PAIRS)[None, None, :]
    inside = (t < rows) & (h < heads) & (p < PAIRS)
    x_ptr += (t // batch) * stride_s + (t % batch) * stride_b + h * stride_h + p
    first = tl.load(x_ptr, mask=inside, other=0.0).to(tl.float32)
    second = tl.load(x_ptr + PAIRS, mask=inside, other=0.0).to(tl.float32)
    cos = tl.load(cos_ptr + (t // batch) * PAIRS + p, mask=t < rows, other=0.0)
    sin = tl.load(sin_ptr + (t // batch) * PAIRS + p, mask=t < rows, other=0.0) * sign
    y_ptr += (t * heads + h) * 2 * PAIRS + p
    tl.store(y_ptr, (first * cos - second * sin).to(y_ptr.dtype.element_ty), mask=inside)
    tl.store(y_ptr + PAIRS, (second * cos + first * sin).to(y_ptr.dtype.element_ty), mask=inside)


def _rotated(x_SBHd: Tensor, cos_SP: Tensor, sin_SP: Tensor, sign: float) -> Tensor:
    length, batch, heads, width = x_SBHd.shape
    y_SBHd = torch.empty(x_SBHd.shape, dtype=x_SBHd.dtype, device=x_SBHd.device)
    padded = triton.next_power_of_2(heads)
    rows = max(1, 2048 // (padded * width // 2))
    _rotate[(triton.cdiv(length * batch, rows),)](
        x_SBHd, cos_SP, sin_SP, y_SBHd, length * batch, batch, heads, *x_SBHd.stride()[:3], sign, width // 2, rows,
        padded, num_warps=4,
    )  # fmt: skip
    return y_SBHd


class _Rotate(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return _rotated(x, cos, sin, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_y):
        return _rotated(d_y.contiguous(), *ctx.saved_tensors, -1.0), None, None


def rotate(x_SBHd: Tensor, cos_SP: Tensor, sin_SP: Tensor) -> Tensor:
    """Compute ``rope.rotate`` for head widths that are powers of two."""
    width = x_SBHd.shape[-1]
    if width & (width - 1):
        return rope.rotate(x_SBHd, cos_SP, sin_SP)
    return _Rotate.apply(x_SBHd if x_SBHd.stride(-1) == 1 else x_SBHd.contiguous(), cos_SP, sin_SP)
