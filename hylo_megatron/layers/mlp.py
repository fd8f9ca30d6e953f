"""MLPs that run in blocks of tokens, so that a long sequence never holds gate and up of all its tokens at once.

An MLP runs in blocks where its values are not kept for a backward pass: in the frozen teacher, in an evaluation, and
where megatron-core recomputes the layer. In the last case the backward pass recomputes one block after another, and
the peak is that of a single block. (megatron-core's ``mlp_chunks_for_training`` keeps the values of all its chunks.)

Every rank cuts its own rows in the same way, so that tensor-parallel ranks call their collectives in one order.
Legend: S sequence, B batch, D model width, F width of the MLP.
"""

import torch
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.random import is_checkpointing
from torch import Tensor, nn

from hylo_megatron.config.decisions import mlp_rows
from hylo_megatron.kernels import ops_for
from hylo_megatron.kernels.chunked import compute_dtype, spans


class SwiGLU(nn.Module):
    """``[.., gate | up] -> silu(gate) * up``, one kernel on a GPU."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return ops_for(x).swiglu_packed(x)


class BlockedMLPLayer(MLPLayer):
    """A norm and an MLP with its residual. ``mlp_block``: ``--hylo-mlp-block``, None for automatic blocks."""

    def __init__(self, config, *args, mlp_block: int | None = None, **kwargs):
        super().__init__(config, *args, **kwargs)
        self.mlp_block = mlp_block
        split = config.tensor_model_parallel_size
        self.width = 2 * config.ffn_hidden_size // split  # gate and up of a rank
        self.gathered = split if config.sequence_parallel else 1
        # Layers alternate between mixers and MLPs: in chunks of one or two the MLP is a chunk's last layer.
        chunk = config.recompute_num_layers or 1
        self.ends_chunk = config.recompute_method == "block" or chunk <= 2

    def _forward_mlp(self, hidden_states: Tensor, *args, **kwargs):
        rows = mlp_rows(len(hidden_states), hidden_states.shape[1] * self.gathered, self.width, self.mlp_block)
        recorded = torch.is_grad_enabled()
        if rows >= len(hidden_states) or (recorded and not is_checkpointing()):
            return self.whole(hidden_states)
        if not recorded:
            return self.in_blocks(hidden_states, rows)
        weights = [parameter for parameter in self.parameters() if parameter.requires_grad]
        return _BlockByBlock.apply(hidden_states, self, rows, *weights)

    def whole(self, x_SBD: Tensor) -> Tensor:
        return super()._forward_mlp(x_SBD)

    def in_blocks(self, x_SBD: Tensor, rows: int) -> Tensor:
        out_SBD = torch.empty_like(x_SBD)
        for block in spans(len(x_SBD), rows):
            out_SBD[block] = self.whole(x_SBD[block])
        return out_SBD


class _BlockByBlock(torch.autograd.Function):
    """The second run of a recomputed layer: only its backward pass computes, block by block.

    Nothing reads the output of the last layer of a recomputed chunk, so it is left empty.
    """

    @staticmethod
    def forward(ctx, x_SBD: Tensor, layer: BlockedMLPLayer, rows: int, *weights: Tensor):
        ctx.layer, ctx.rows, ctx.weights = layer, rows, weights
        ctx.save_for_backward(x_SBD)
        return torch.empty_like(x_SBD) if layer.ends_chunk else layer.in_blocks(x_SBD, rows)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, d_out_SBD: Tensor):
        (x_SBD,) = ctx.saved_tensors
        d_x_SBD = torch.empty_like(x_SBD)
        sums = [torch.zeros(w.shape, dtype=compute_dtype(w), device=w.device) for w in ctx.weights]
        for block in spans(len(x_SBD), ctx.rows):
            x = x_SBD[block].detach().requires_grad_()
            with torch.enable_grad():
                out = ctx.layer.whole(x)
            # torch.autograd.grad reaches no hook of the weights: megatron-core counts each weight's gradient once.
            d_x_SBD[block], *gradients = torch.autograd.grad(out, [x, *ctx.weights], d_out_SBD[block])
            for total, gradient in zip(sums, gradients, strict=True):
                total += gradient
        return d_x_SBD, None, None, *(total.to(w.dtype) for total, w in zip(sums, ctx.weights, strict=True))
