"""Weights that stay where they are, which vLLM's CPU build does not leave to a model."""

import torch.nn.functional as F
from torch import Tensor, nn
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod


class PlainHead(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer) -> None:
        """Leave the weights as they are."""

    def apply(self, layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)


def keep_weights(model: nn.Module) -> None:
    """Let matrix products read the model's parameters.

    vLLM's CPU build packs copies for its kernels. It drops the parameters of linear layers, so that updates would find
    no place, and keeps those of the output head unread.
    """
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedLinearMethod):
            module._cpu_skip_gemm_dispatch = True
        elif isinstance(method, UnquantizedEmbeddingMethod):
            module.quant_method = PlainHead()
