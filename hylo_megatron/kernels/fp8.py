"""Products in FP8 (e4m3) with a scale for each row of both factors, for a frozen model's forward pass.

A row is divided by its largest value over 448, e4m3's largest: rounding then takes at most 1/16 of a value, or of the
row's largest value over 448 * 64. Sums are fp32. A CPU computes the same products with the same roundings.
"""

import torch
from torch import Tensor

from hylo_megatron.kernels.norm import wide

FP8, LARGEST = torch.float8_e4m3fn, 448.0
ALIGNED = 16  # both widths of a product have to be multiples


def quantise_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``x [T, K]`` in e4m3 and the scale of each row, fp32 ``[T, 1]``; their product is ``x``, rounded."""
    x = wide(x)
    scale = x.abs().amax(-1, keepdim=True) / LARGEST
    scale = torch.where(scale > 0, scale, 1.0)
    return (x / scale).to(FP8), scale.float()


def scaled_product(x_TK: Tensor, scale_T1: Tensor, weight_NK: Tensor, scale_N1: Tensor, dtype: torch.dtype) -> Tensor:
    """Return ``x Wᵀ`` in ``dtype`` from what ``quantise_rows`` made of ``x`` and ``W``."""
    return torch._scaled_mm(
        x_TK, weight_NK.t(), scale_a=scale_T1, scale_b=scale_N1.t(), out_dtype=dtype, use_fast_accum=x_TK.is_cuda
    )
