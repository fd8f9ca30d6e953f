"""Layer specs for ``HybridModel``. Every mixer has its own spec; those of MLP and stack are here.

A backend provides the layers (``local``: torch; ``te``: TransformerEngine).
"""

from dataclasses import replace
from functools import partial

import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from hylo_megatron.config import Architecture
from hylo_megatron.errors import HyLoError
from hylo_megatron.layers.mlp import BlockedMLPLayer, SwiGLU
from hylo_megatron.mixers import MIXERS
from hylo_megatron.mixers.megatron_attention import CoreAttention
from hylo_megatron.mixers.megatron_layers import Backend, RMSNorm
from hylo_megatron.mixers.megatron_linear import ALIGNED_WIDTH, AlignedColumnParallelLinear
from hylo_megatron.mixers.megatron_window import window_of
from hylo_megatron.packages import load


def backend(name: str) -> Backend:
    """Return ``local`` or ``te``. Raises ``HyLoError`` if TransformerEngine is requested but does not import."""
    if name != "te":
        return Backend(
            norm=RMSNorm,
            column_linear=ColumnParallelLinear,
            projection=AlignedColumnParallelLinear,
            row_linear=RowParallelLinear,
            core_attention=CoreAttention,
        )
    # megatron-core silently goes on without TransformerEngine where it does not import.
    load("transformer-engine", "--hylo-backend te", "transformer_engine.pytorch")
    from megatron.core.extensions import transformer_engine as te

    # Both backends use SDPA: TE's attention does not support MLA's two widths on every card, nor our context
    # parallelism.
    return Backend(
        norm=te.TENorm,
        column_linear=te.TEColumnParallelLinear,
        projection=TEProjection,
        row_linear=te.TERowParallelLinear,
        core_attention=CoreAttention,
    )


def check_cuda() -> None:
    if not torch.cuda.device_count():
        raise HyLoError(
            "--hylo-backend te: TransformerEngine computes on CUDA devices alone, and none is here; leave the flag out"
        )


class TEProjection:
    """TransformerEngine's layer where each rank's output has an aligned width, else torch's, which aligns its own."""

    def __new__(cls, inputs: int, outputs: int, *, tp_group, **kwargs):
        from megatron.core.extensions import transformer_engine as te

        aligned = outputs // tp_group.size() % ALIGNED_WIDTH == 0
        kind = te.TEColumnParallelLinear if aligned else AlignedColumnParallelLinear
        return kind(inputs, outputs, tp_group=tp_group, **kwargs)


class HyLoStack(HybridStack):
    """A ``HybridStack`` with the backend's last norm, where the original has TENorm (``hybrid_block.py:215``)."""

    def __init__(self, config, submodules, *args, final_norm, post_layer_norm=True, **kwargs):
        super().__init__(config, submodules, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def _mlp(b: Backend, mlp_block: int | None) -> ModuleSpec:
    mlp = MLPSubmodules(linear_fc1=b.column_linear, linear_fc2=b.row_linear, activation_func=SwiGLU)
    return ModuleSpec(
        module=BlockedMLPLayer,
        params={"mlp_block": mlp_block},
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=b.norm, mlp=partial(MLP.as_mlp_submodule, submodules=mlp), mlp_bda=get_bias_dropout_add
        ),
    )


def stack_spec(
    arch: Architecture, backend_name: str = "local", linear_cp: str = "auto", mlp_block: int | None = None
) -> ModuleSpec:
    """Return ``HybridModel``'s spec for ``arch``, teacher or hybrid.

    ``linear_cp`` and ``mlp_block`` are ``--hylo-linear-cp`` and ``--hylo-mlp-block``.
    """
    b = backend(backend_name)
    b = replace(b, window=window_of(arch, b))
    layers = {
        MIXERS[kind].slot: MIXERS[kind].part("megatron_module").layer_spec(b, arch, linear_cp)
        for kind in dict.fromkeys(arch.plan)
    }
    return ModuleSpec(
        module=HyLoStack,
        params={"final_norm": b.norm},
        submodules=HybridStackSubmodules(mlp_layer=_mlp(b, mlp_block), **layers),
    )
