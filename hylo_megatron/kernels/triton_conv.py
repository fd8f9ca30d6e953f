"""The convolutions of a linear block's input projection in one pass over the projection, in Triton.

The kernels read any layout of the projection and write each section contiguously; the backward pass writes one
gradient for the whole projection. Results equal those of ``conv.split_convolve`` (tested on a CPU in Triton's
interpreter). Legend: B batch, S sequence, C channels of the projection, N channels of a section, W width of the
convolution.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS, COLUMNS = 32, 64  # rows and columns of a tile
SUM_ROWS, TILES = 16, 16  # rows and number of the tiles over which one program sums the taps' gradients


@triton.jit
def _before_silu(x_ptr, w_ptr, bias_ptr, halo_ptr, t, c, channels, length, stride_s, halo_s, WIDTH: tl.constexpr,
                 BIAS: tl.constexpr, HALO: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr):  # fmt: skip
    """Return the convolution at rows ``t`` and channels ``c``, in fp32."""
    here = c < channels
    total = tl.zeros((ROWS, COLUMNS), tl.float32)
    for i in tl.static_range(WIDTH):
        at = t - (WIDTH - 1) + i
        mask = ((at >= 0) & (t < length))[:, None] & here[None, :]
        x = tl.load(x_ptr + at.to(tl.int64)[:, None] * stride_s + c[None, :], mask=mask, other=0.0).to(tl.float32)
        if HALO:  # W-1 rows before the first
            mask = ((at < 0) & (t < length))[:, None] & here[None, :]
            row = (at + WIDTH - 1)[:, None]
            x += tl.load(halo_ptr + row * halo_s + c[None, :], mask=mask, other=0.0).to(tl.float32)
        total += x * tl.load(w_ptr + c * WIDTH + i, mask=here, other=0.0).to(tl.float32)[None, :]
    if BIAS:
        total += tl.load(bias_ptr + c, mask=here, other=0.0).to(tl.float32)[None, :]
    return total


@triton.jit
def convolve_forward(x_ptr, w_ptr, bias_ptr, halo_ptr, y_ptr, length, channels, stride_b, stride_s, halo_s,
                     WIDTH: tl.constexpr, BIAS: tl.constexpr, HALO: tl.constexpr, ROWS: tl.constexpr,
                     COLUMNS: tl.constexpr):  # fmt: skip
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(2).to(tl.int64)
    inside = (t < length)[:, None] & (c < channels)[None, :]
    x_ptr += batch * stride_b
    if HALO:
        halo_ptr += batch * (WIDTH - 1) * halo_s
    if WIDTH == 0:  # the section is copied, not convolved
        y = tl.load(x_ptr + t.to(tl.int64)[:, None] * stride_s + c[None, :], mask=inside)
    else:
        z = _before_silu(x_ptr, w_ptr, bias_ptr, halo_ptr, t, c, channels, length, stride_s, halo_s, WIDTH, BIAS, HALO,
                         ROWS, COLUMNS)  # fmt: skip
        y = z * tl.sigmoid(z)
    rows = batch * length + t
    tl.store(y_ptr + rows[:, None] * channels + c[None, :], y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def convolve_backward_silu(x_ptr, w_ptr, bias_ptr, halo_ptr, dy_ptr, dz_ptr, length, channels, stride_b, stride_s,
                           halo_s, WIDTH: tl.constexpr, BIAS: tl.constexpr, HALO: tl.constexpr, ROWS: tl.constexpr,
                           COLUMNS: tl.constexpr):  # fmt: skip
    """Write dz [B,S,N], the gradient before SiLU."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(2).to(tl.int64)
    inside = (t < length)[:, None] & (c < channels)[None, :]
    x_ptr += batch * stride_b
    if HALO:
        halo_ptr += batch * (WIDTH - 1) * halo_s
    z = _before_silu(x_ptr, w_ptr, bias_ptr, halo_ptr, t, c, channels, length, stride_s, halo_s, WIDTH, BIAS, HALO,
                     ROWS, COLUMNS)  # fmt: skip
    at_y = (batch * length + t)[:, None] * channels + c[None, :]
    gate = tl.sigmoid(z)
    dz = tl.load(dy_ptr + at_y, mask=inside, other=0.0).to(tl.float32) * gate * (1 + z * (1 - gate))
    tl.store(dz_ptr + at_y, dz.to(dz_ptr.dtype.element_ty), mask=inside)


@triton.jit
def convolve_backward_input(dz_ptr, x_ptr, w_ptr, dx_ptr, dw_ptr, length, channels, stride_b, stride_s,
                            WIDTH: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
                            TILES: tl.constexpr):  # fmt: skip
    """Write the gradient of the input, and the parts of the gradient of taps and bias.

    dx at t is the sum of w_i dz at t + W - 1 - i, in the projection's layout. The same dz times x at t sum up to the
    gradient of the taps and, with i = W - 1, of the bias: dw [programs,W+1,N], of which each program writes a part.
    """
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    here = c < channels
    batch = tl.program_id(2).to(tl.int64)
    part = (batch * tl.num_programs(1) + tl.program_id(1)) * (WIDTH + 1)
    dz_ptr += batch * length * channels
    x_ptr += batch * stride_b
    dx_ptr += batch * stride_b
    d_w0 = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_w1 = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_w2 = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_w3 = tl.zeros((ROWS, COLUMNS), tl.float32)
    d_bias = tl.zeros((ROWS, COLUMNS), tl.float32)
    for tile in range(TILES):
        t = (tl.program_id(1) * TILES + tile) * ROWS + tl.arange(0, ROWS)
        inside = (t < length)[:, None] & here[None, :]
        at_x = t.to(tl.int64)[:, None] * stride_s + c[None, :]
        x = tl.load(x_ptr + at_x, mask=inside, other=0.0).to(tl.float32)
        dx = tl.zeros((ROWS, COLUMNS), tl.float32)
        for i in tl.static_range(WIDTH):
            at = t + (WIDTH - 1 - i)
            mask = inside & (at < length)[:, None]
            dz = tl.load(dz_ptr + at.to(tl.int64)[:, None] * channels + c[None, :], mask=mask, other=0.0)
            dz = dz.to(tl.float32)
            dx += dz * tl.load(w_ptr + c * WIDTH + i, mask=here, other=0.0).to(tl.float32)[None, :]
            d_tap = dz * x
            if i == 0:
                d_w0 += d_tap
            elif i == 1:
                d_w1 += d_tap
            elif i == 2:
                d_w2 += d_tap
            else:
                d_w3 += d_tap
            if i == WIDTH - 1:
                d_bias += dz
        tl.store(dx_ptr + at_x, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dw_ptr + part * channels + c, tl.sum(d_w0, 0), mask=here)
    if WIDTH > 1:
        tl.store(dw_ptr + (part + 1) * channels + c, tl.sum(d_w1, 0), mask=here)
    if WIDTH > 2:
        tl.store(dw_ptr + (part + 2) * channels + c, tl.sum(d_w2, 0), mask=here)
    if WIDTH > 3:
        tl.store(dw_ptr + (part + 3) * channels + c, tl.sum(d_w3, 0), mask=here)
    tl.store(dw_ptr + (part + WIDTH) * channels + c, tl.sum(d_bias, 0), mask=here)


@triton.jit
def copy_backward(dy_ptr, dx_ptr, length, channels, stride_b, stride_s, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Write the gradient of a section that is not convolved, in the projection's layout."""
    c = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    t = tl.program_id(1) * ROWS + tl.arange(0, ROWS)
    batch = tl.program_id(2).to(tl.int64)
    inside = (t < length)[:, None] & (c < channels)[None, :]
    dx = tl.load(dy_ptr + (batch * length + t)[:, None] * channels + c[None, :], mask=inside)
    tl.store(dx_ptr + batch * stride_b + t.to(tl.int64)[:, None] * stride_s + c[None, :], dx, mask=inside)


def _sections(sizes: tuple[int, ...], start: int, channels: int):
    """Return ``(first column, size, first row of the taps | None)`` of each section."""
    first = 0
    for size in sizes:
        row = first - start
        yield first, size, row if 0 <= row < channels else None
        first += size


def _of_section(row: int | None, taps_NW: Tensor, bias_N: Tensor | None, halo_BWN: Tensor | None):
    """Return taps, bias and halo from the section's first row of taps on; None if the section is not convolved."""
    if row is None:
        return None, None, None
    return taps_NW[row:], None if bias_N is None else bias_N[row:], None if halo_BWN is None else halo_BWN[..., row:]


def _from_halo(halo_BWN: Tensor, d_z: Tensor, taps_NW: Tensor, d_taps_WN: Tensor) -> Tensor:
    """Return the gradient of the W-1 rows before the first, and add to ``d_taps_WN`` what these rows gave.

    Row j of the halo reached row j - i of the output through tap i.
    """
    halo, d_halo, rows = halo_BWN.float(), torch.zeros_like(halo_BWN, dtype=torch.float32), halo_BWN.shape[1]
    for i in range(rows):
        reached = d_z[:, : rows - i].float()
        d_halo[:, i : i + reached.shape[1]] += taps_NW[:, i].float() * reached
        d_taps_WN[i] += (halo[:, i : i + reached.shape[1]] * reached).sum((0, 1))
    return d_halo.to(halo_BWN.dtype)


class _SplitConvolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x_BSC, taps_NW, bias_N, halo_BWN, sizes, start):
        batch, length, _ = x_BSC.shape
        outs = []
        for first, size, row in _sections(sizes, start, len(taps_NW)):
            out = torch.empty(batch, length, size, dtype=x_BSC.dtype, device=x_BSC.device)
            taps, bias, halo = _of_section(row, taps_NW, bias_N, halo_BWN)
            width, strides = 0 if taps is None else taps.shape[1], (x_BSC.stride(0), x_BSC.stride(1), len(taps_NW))
            grid = (triton.cdiv(size, COLUMNS), triton.cdiv(length, ROWS), batch)
            convolve_forward[grid](x_BSC[..., first:], taps, bias, halo, out, length, size, *strides, width,
                                   bias is not None, halo is not None, ROWS, COLUMNS, num_warps=4)  # fmt: skip
            outs.append(out)
        ctx.save_for_backward(x_BSC, taps_NW, bias_N, halo_BWN)
        ctx.sizes, ctx.start = sizes, start
        return tuple(outs)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *d_outs):
        x_BSC, taps_NW, bias_N, halo_BWN = ctx.saved_tensors
        batch, length, _ = x_BSC.shape
        d_x = torch.empty_strided(x_BSC.shape, x_BSC.stride(), dtype=x_BSC.dtype, device=x_BSC.device)
        d_taps = torch.empty(taps_NW.shape[1] + 1, len(taps_NW), dtype=torch.float32, device=x_BSC.device)
        d_halo = None if halo_BWN is None else torch.empty_like(halo_BWN)
        for (first, size, row), d_out in zip(_sections(ctx.sizes, ctx.start, len(taps_NW)), d_outs, strict=True):
            d_out, x, d_section = d_out.contiguous(), x_BSC[..., first:], d_x[..., first:]
            columns, rows = triton.cdiv(size, COLUMNS), triton.cdiv(length, ROWS)
            shape = (length, size, x_BSC.stride(0), x_BSC.stride(1))
            if row is None:
                copy_backward[columns, rows, batch](d_out, d_section, *shape, ROWS, COLUMNS, num_warps=4)
                continue
            taps, bias, halo = _of_section(row, taps_NW, bias_N, halo_BWN)
            width, d_z = taps.shape[1], torch.empty_like(d_out)
            convolve_backward_silu[columns, rows, batch](x, taps, bias, halo, d_out, d_z, *shape, len(taps_NW), width,
                                                         bias is not None, halo is not None, ROWS, COLUMNS,
                                                         num_warps=4)  # fmt: skip
            parts, here = triton.cdiv(length, SUM_ROWS * TILES), slice(row, row + size)
            sums = d_taps.new_empty(batch * parts, width + 1, size)
            convolve_backward_input[columns, parts, batch](d_z, x, taps, d_section, sums, *shape, width, SUM_ROWS,
                                                           COLUMNS, TILES, num_warps=8)  # fmt: skip
            d_taps[:, here] = sums.sum(0)
            if halo is not None:
                d_halo[..., here] = _from_halo(halo_BWN[..., here], d_z, taps_NW[here], d_taps[:, here])
        d_x[..., sum(ctx.sizes) :].zero_()
        d_bias = None if bias_N is None else d_taps[-1].to(bias_N.dtype)
        return d_x, d_taps[:-1].t().to(taps_NW.dtype), d_bias, d_halo, None, None


def split_convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    sizes: tuple[int, ...],
    start: int = 0,
    halo: Tensor | None = None,
):
    """Compute ``conv.split_convolve``."""
    if weight.shape[1] > 4:
        raise NotImplementedError(f"a convolution of width {weight.shape[1]}: the fused kernel goes to 4")
    x = x if x.stride(-1) == 1 else x.contiguous()
    halo = halo if halo is None else halo.contiguous()
    return _SplitConvolve.apply(x, weight.contiguous(), bias, halo, tuple(sizes), start)
