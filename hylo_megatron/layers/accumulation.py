"""Gradients of weights that are added to the main gradient inside the product that computes them.

Without this a micro-batch writes each weight's gradient in 16 bits, and a second kernel reads it to add it up in fp32:
12 bytes of traffic a weight in place of 8. megatron-core's layers need a kernel of Apex, TransformerEngine's none.
"""

from megatron.core.tensor_parallel import layers
from torch import Tensor, nn


def on_gpu(weight: Tensor) -> bool:
    return weight.is_cuda


def accumulate_in_products(model: nn.Module) -> int:
    """Let the layers of ``model.decoder`` do so that can. Returns their number."""
    count = 0
    for module in model.decoder.modules():
        if isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
            module.gradient_accumulation_fusion = layers._grad_accum_fusion_available and on_gpu(module.weight)
            count += module.gradient_accumulation_fusion
        elif hasattr(module, "fuse_wgrad_accumulation"):  # TransformerEngine's
            module.fuse_wgrad_accumulation = True
            count += 1
    return count
