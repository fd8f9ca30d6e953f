"""Layer specs for ``HybridModel``: one table, filled in by a backend (``local``: torch; ``te``: TransformerEngine)."""

from dataclasses import dataclass
from functools import partial

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
from megatron.core.ssm import mamba_mixer
from megatron.core.ssm.gated_delta_net import GatedDeltaNetSubmodules
from megatron.core.ssm.mamba_layer import MambaLayer, MambaLayerSubmodules
from megatron.core.ssm.mamba_mixer import MambaMixerSubmodules
from megatron.core.ssm.mlp_layer import MLPLayer
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from hylo_megatron.capabilities import require
from hylo_megatron.config import Architecture
from hylo_megatron.kernels import mamba_split_conv1d_scan_combined, ops_for
from hylo_megatron.layers.core_attention import CoreAttention
from hylo_megatron.layers.linear_blocks import AlignedColumnParallelLinear, GDNMixer, Mamba2Mixer
from hylo_megatron.layers.mla import MLASelfAttention
from hylo_megatron.layers.norm import HeadRMSNorm, RMSNorm
from hylo_megatron.layers.rope import Rotary


@dataclass(frozen=True)
class Backend:
    norm: type
    column_linear: type
    projection: type  # of linear blocks
    row_linear: type
    core_attention: type


def backend(name: str) -> Backend:
    """``local`` or ``te``. Raises ``HyLoError`` when TransformerEngine is asked for and missing."""
    if name != "te":
        return Backend(RMSNorm, ColumnParallelLinear, AlignedColumnParallelLinear, RowParallelLinear, CoreAttention)
    require("transformer-engine", "--hylo-backend te")
    from megatron.core.extensions import transformer_engine as te

    # SDPA stays: TE's attention takes neither MLA's two widths on every card nor our layout of context parallelism.
    linear = te.TEColumnParallelLinear
    return Backend(te.TENorm, linear, linear, te.TERowParallelLinear, CoreAttention)


class HyLoStack(HybridStack):
    """``HybridStack`` hard-codes TENorm as its last norm (``hybrid_block.py:215``); this one takes the backend's."""

    def __init__(self, config, submodules, *args, final_norm, post_layer_norm=True, **kwargs):
        super().__init__(config, submodules, *args, post_layer_norm=False, **kwargs)
        self.post_layer_norm = post_layer_norm
        if self.post_process and post_layer_norm:
            self.final_norm = final_norm(config=config, hidden_size=config.hidden_size, eps=config.layernorm_epsilon)


def _mixer_layer(b: Backend, mixer: ModuleSpec) -> ModuleSpec:
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=b.norm, self_attention=mixer, self_attn_bda=get_bias_dropout_add
        ),
    )


def _attention(b: Backend, arch: Architecture) -> ModuleSpec:
    head_norm = HeadRMSNorm if arch.qk_norm else None
    rotary = Rotary(arch.rope_parameters, arch.head_dim, arch.max_position_embeddings)  # one for all layers
    return ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=b.column_linear, linear_proj=b.row_linear,
            core_attention=ModuleSpec(module=b.core_attention, params={"rotary": rotary}),
            q_layernorm=head_norm, k_layernorm=head_norm,
        ),
    )  # fmt: skip


def _mla(b: Backend, arch: Architecture) -> ModuleSpec:
    return ModuleSpec(
        module=MLASelfAttention,
        params={
            "geometry": arch.geometry.mla, "rope_parameters": arch.rope_parameters,
            "max_positions": arch.max_position_embeddings, "qk_norm": arch.mla_qk_norm,
            "column_linear": b.column_linear, "row_linear": b.row_linear, "core_attention": b.core_attention,
        },
    )  # fmt: skip


def _gdn(b: Backend, linear_cp: str, norm_eps: float | None = None) -> ModuleSpec:
    return ModuleSpec(
        module=GDNMixer,
        params={"linear_cp": linear_cp, "norm_eps": norm_eps},
        submodules=GatedDeltaNetSubmodules(in_proj=b.projection, out_norm=HeadRMSNorm, out_proj=b.row_linear),
    )


def _mamba2(b: Backend, linear_cp: str) -> ModuleSpec:
    ours = mamba_mixer.mamba_split_conv1d_scan_combined is mamba_split_conv1d_scan_combined
    projection = b.projection if ours else b.column_linear  # mamba-ssm's own kernel wants the exact width
    mixer = ModuleSpec(
        module=Mamba2Mixer,
        params={"linear_cp": linear_cp},
        submodules=MambaMixerSubmodules(in_proj=projection, out_proj=b.row_linear),
    )
    return ModuleSpec(
        module=MambaLayer,
        submodules=MambaLayerSubmodules(norm=b.norm, mixer=mixer, mamba_bda=get_bias_dropout_add),
    )


class SwiGLU(nn.Module):
    """``[.., gate | up] -> silu(gate) * up``, one kernel on a GPU."""

    def __init__(self, config):
        super().__init__()

    def forward(self, x: Tensor) -> Tensor:
        return ops_for(x).swiglu_packed(x)


def _mlp(b: Backend) -> ModuleSpec:
    mlp = MLPSubmodules(linear_fc1=b.column_linear, linear_fc2=b.row_linear, activation_func=SwiGLU)
    return ModuleSpec(
        module=MLPLayer,
        submodules=TransformerLayerSubmodules(
            pre_mlp_layernorm=b.norm,
            mlp=partial(MLP.as_mlp_submodule, submodules=mlp),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def stack_spec(arch: Architecture, backend_name: str = "local", linear_cp: str = "auto") -> ModuleSpec:
    """The spec that ``HybridModel`` takes for ``arch``, teacher or hybrid; ``linear_cp``: ``--hylo-linear-cp``."""
    b = backend(backend_name)
    layers = {"attention_layer": _mixer_layer(b, _attention(b, arch)), "mlp_layer": _mlp(b)}
    if arch.geometry:
        layers |= {
            "mla_layer": _mixer_layer(b, _mla(b, arch)),
            "gdn_layer": _mixer_layer(b, _gdn(b, linear_cp, arch.geometry.gdn.norm_eps)),
            "mamba_layer": _mamba2(b, linear_cp),
        }
    return ModuleSpec(module=HyLoStack, params={"final_norm": b.norm}, submodules=HybridStackSubmodules(**layers))
