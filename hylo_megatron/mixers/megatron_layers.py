"""What the Megatron modules of several mixers are made of: norms, rotary embeddings, the layer around a mixer.

A mixer's ``megatron_module.py`` has

    TRANSFORMER_FIELDS    fields of ``TransformerConfig`` that the mixer fills, and those of its geometry
    layer_spec            the spec of the layer that holds the mixer, for its slot in ``HybridStackSubmodules``

Legend: S sequence, B batch, H heads, d head dimension.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from hylo_megatron.config import Architecture
from hylo_megatron.config.positions import has_window
from hylo_megatron.kernels import ops_for, rms_norm
from hylo_megatron.kernels.rope import cos_and_sin, rope_frequencies
from hylo_megatron.parallel.zigzag import zigzag_positions


@dataclass(frozen=True, kw_only=True)
class Backend:
    """The classes that layers are made of: torch's or TransformerEngine's.

    ``projection``: of linear blocks. ``window`` makes the window of a layer, if the model has windows.
    """

    norm: type
    column_linear: type
    projection: type
    row_linear: type
    core_attention: type
    window: Callable | None = None

    def window_beside(self, kind: str, arch: Architecture) -> Callable | None:
        """Return what makes the window of a layer of ``kind``, or None."""
        return self.window if has_window(arch.window, kind) else None

    def column(self, inputs: int, outputs: int, config, tp_group, kind: type | None = None) -> nn.Module:
        """Return a projection without bias whose outputs tensor-parallel ranks share."""
        return build_module(
            kind or self.column_linear, inputs, outputs, config=config, init_method=config.init_method,
            gather_output=False, bias=False, skip_bias_add=False, is_expert=False, tp_group=tp_group,
        )  # fmt: skip

    def row(self, inputs: int, outputs: int, config, tp_group) -> nn.Module:
        """Return a mixer's last projection, without bias, whose inputs tensor-parallel ranks share."""
        return build_module(
            self.row_linear, inputs, outputs, config=config, init_method=config.output_layer_init_method, bias=False,
            input_is_parallel=True, skip_bias_add=True, is_expert=False, tp_group=tp_group,
        )  # fmt: skip


class RMSNorm(nn.Module):
    """RMSNorm (arXiv 1910.07467) over the last dimension, statistics in fp32.

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
    """RMSNorm inside a head (Qwen3's query and key norm, a linear block's output norm); all heads share one weight.

    Each tensor-parallel rank sees other heads, so the weight's gradient is summed over ranks in the backward pass.
    (megatron sums it only under sequence parallelism, which is not enough.)
    """

    def __init__(self, config, hidden_size: int, eps: float = 1e-5, **_):
        super().__init__(config, hidden_size, eps)
        self.weight.sequence_parallel = False

    def shared_weight(self) -> Tensor:
        """Return the weight; its gradient is the sum over tensor-parallel ranks."""
        return copy_to_tensor_model_parallel_region(self.weight)

    def forward(self, x: Tensor) -> Tensor:
        return rms_norm(x, self.shared_weight(), self.eps)


class ReplicatedLinear(nn.Module):
    """``y = x Wᵀ`` with the same weight on every tensor-parallel rank."""

    def __init__(self, in_features: int, out_features: int, config):
        super().__init__()
        self.weight = nn.Parameter(
            torch.empty(out_features, in_features, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        config.init_method(self.weight)
        self.weight.sequence_parallel = config.sequence_parallel

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight)


class Rotary:
    """Rotary position embeddings of queries and keys: megatron-core's attention gets none, ours turns its own.

    ``rotary(x_SBHd, ranks, rank)`` rotates whole heads by the positions of a context-parallel rank, or of those of its
    ``length`` tokens that ``tokens`` says. All layers of a model share one, which keeps a table for each length.
    """

    def __init__(self, arch: Architecture, dim: int):
        self.frequencies, self.scaling = rope_frequencies(arch.rope_parameters, dim, arch.max_position_embeddings)
        self.tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def table(self, local_length: int, ranks: int, rank: int, device) -> tuple[Tensor, Tensor]:
        """Return cosines and sines of the rank's positions, fp32 ``[S, dim / 2]``."""
        key = (local_length, ranks, rank, device)
        if key not in self.tables:
            table = cos_and_sin(zigzag_positions(*key[:3]), self.frequencies, self.scaling)
            self.tables[key] = tuple(part.to(device) for part in table)
        return self.tables[key]

    def __call__(
        self, x_SBHd: Tensor, ranks: int, rank: int, length: int | None = None, tokens: slice = slice(None)
    ) -> Tensor:
        cos, sin = self.table(length or len(x_SBHd), ranks, rank, x_SBHd.device)
        return ops_for(x_SBHd).rotate(x_SBHd, cos[tokens], sin[tokens])


def transformer_layer(backend: Backend, mixer: ModuleSpec) -> ModuleSpec:
    """Return the spec of a layer of megatron-core that holds a norm and ``mixer`` as its ``self_attention``."""
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=backend.norm, self_attention=mixer, self_attn_bda=get_bias_dropout_add
        ),
    )
