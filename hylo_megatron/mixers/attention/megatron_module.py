"""megatron-core's softmax attention with our core attention, which turns queries and keys itself."""

from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec

from hylo_megatron.config import Architecture
from hylo_megatron.mixers.megatron_layers import Backend, HeadRMSNorm, Rotary, transformer_layer

TRANSFORMER_FIELDS: dict[str, str] = {}  # the base model's are filled already


def layer_spec(backend: Backend, arch: Architecture, linear_cp: str = "auto") -> ModuleSpec:
    """Return the spec of the layer that holds this mixer."""
    head_norm = HeadRMSNorm if arch.qk_norm else None
    rotary = Rotary(arch, arch.head_dim)  # one for all layers
    attention = ModuleSpec(
        module=SelfAttention,
        params={"attn_mask_type": AttnMaskType.causal},
        submodules=SelfAttentionSubmodules(
            linear_qkv=backend.column_linear,
            linear_proj=backend.row_linear,
            core_attention=ModuleSpec(module=backend.core_attention, params={"rotary": rotary}),
            q_layernorm=head_norm,
            k_layernorm=head_norm,
        ),
    )
    return transformer_layer(backend, attention)
