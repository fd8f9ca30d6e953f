"""A frozen model whose layers multiply in FP8 (``kernels/fp8.py``); norms, attention, embedding and head stay.

Weights are rounded once and kept in FP8, which is half of their memory. Only forward passes without a gradient work.
"""

import contextlib
from collections.abc import Iterator
from functools import partial

import torch
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor, nn

from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import ops_for
from hylo_megatron.kernels.fp8 import ALIGNED, scaled_product

FLAG = "--hylo-teacher-fp8"
OLDEST = (8, 9)  # compute capability of the first cards with FP8 products


def check_card(flag: str = FLAG) -> None:
    """Refuse a GPU without FP8 products. A CPU computes those of ``FLAG``, slowly."""
    if torch.cuda.device_count() and torch.cuda.get_device_capability() < OLDEST:
        name = torch.cuda.get_device_name()
        raise HyLoError(f"{flag}: {name} has no FP8 products, expected Ada, Hopper or newer; leave the flag out")


def check_widths(name: str, weight: Tensor, what: str = f"{FLAG}: {{}} of the teacher") -> None:
    if any(width % ALIGNED for width in weight.shape):
        size = " x ".join(map(str, weight.shape))
        raise HyLoError(
            f"{what.format(name)} is {size} on a rank, expected multiples of {ALIGNED}; use fewer"
            " tensor-parallel ranks, or leave the flag out"
        )


@contextlib.contextmanager
def refusing_widths() -> Iterator[None]:
    """Raise ``HyLoError`` in place of the assertions of megatron-core's mixers about widths for FP8."""
    try:
        yield
    except AssertionError as error:
        if "FP8" not in str(error):
            raise
        reason = str(error).partition(". when instantiating")[0]
        raise HyLoError(f"--fp8-format: megatron-core cannot build the student ({reason}); leave it out") from error


def check_projections(model: nn.Module) -> None:
    """Refuse a student whose TransformerEngine layers cannot multiply in FP8."""
    for name, module in model.decoder.named_modules():
        if hasattr(module, "fuse_wgrad_accumulation"):  # TransformerEngine's
            check_widths(name, module.weight, "--fp8-format: {} of the student")


@torch.no_grad()
def to_fp8(model: nn.Module) -> None:
    """Round the weights of the layers' projections, in place of the old ones."""
    for name, module in model.decoder.named_modules():
        if isinstance(module, ColumnParallelLinear | RowParallelLinear):
            check_widths(name, module.weight)
            weight, scale = ops_for(module.weight).quantise_rows(module.weight)
            module.weight = nn.Parameter(weight, requires_grad=False)
            module._forward_impl = partial(_product, scale)


def _product(scale_N1: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None,
             sequence_parallel: bool = False, tp_group=None, **_) -> Tensor:  # fmt: skip
    """Stand in for the product of megatron-core's parallel linear layers, whose arguments these are."""
    if torch.is_grad_enabled():
        raise RuntimeError("FP8 products have no gradient")
    if sequence_parallel:
        input = gather_from_sequence_parallel_region(input, group=tp_group)
    x_TK, scale_T1 = ops_for(input).quantise_rows(input.flatten(0, -2))
    out = scaled_product(x_TK, scale_T1, weight, scale_N1, input.dtype).unflatten(0, input.shape[:-1])
    return out if bias is None else out + bias
