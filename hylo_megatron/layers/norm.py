"""RMSNorm (arXiv 1910.07467) for layer specs without TransformerEngine."""

import torch
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from torch import Tensor, nn

from hylo_megatron.kernels import ops_for, rms_norm


class RMSNorm(nn.Module):
    """RMSNorm over the last dimension, statistics in fp32.

    megatron's own torch norm forbids sequence parallelism; this one marks its weight, so that gradients of the
    sequence shards are summed over tensor-parallel ranks.
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return ops_for(x).rms_norm(x, self.weight, self.eps)


class HeadRMSNorm(RMSNorm):
    """RMSNorm inside a head (Qwen3's query and key norm, GDN's output norm); one weight shared by all heads.

    Each tensor-parallel rank sees other heads, so the weight's gradient is summed over ranks in the backward pass.
    (megatron sums it only under sequence parallelism, which is not enough.)
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = False

    def shared_weight(self) -> Tensor:
        """The weight, whose gradient is the sum over tensor-parallel ranks."""
        return copy_to_tensor_model_parallel_region(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.shared_weight(), self.eps)
