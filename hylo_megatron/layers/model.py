"""Build megatron-core's ``HybridModel`` from an ``Architecture``."""

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import nn

from hylo_megatron.config import Architecture
from hylo_megatron.engine.register import check_installed
from hylo_megatron.layers.specs import stack_spec
from hylo_megatron.mixers import MIXERS


def model_fields(arch: Architecture) -> dict:
    """Return the fields of ``TransformerConfig`` that an architecture decides, without parallel sizes and dtypes.

    ``use_te_activation_func`` only means that the spec has the activation (``mlp.SwiGLU``), with or without TE.
    """
    fields = dict(
        num_layers=2 * arch.num_layers, hidden_size=arch.hidden_size, ffn_hidden_size=arch.intermediate_size,
        num_attention_heads=arch.num_attention_heads, num_query_groups=arch.num_key_value_heads,
        kv_channels=arch.head_dim, layernorm_epsilon=arch.rms_norm_eps, normalization="RMSNorm",
        qk_layernorm=arch.qk_norm, add_qkv_bias=arch.attention_bias, add_bias_linear=False, gated_linear_unit=True,
        activation_func=nn.functional.silu, use_te_activation_func=True, hidden_dropout=0.0,
        attention_dropout=0.0, is_hybrid_model=True,
        rotary_interleaved=False, multi_latent_attention=False,
    )  # fmt: skip
    for kind in dict.fromkeys(arch.plan):
        table, g = MIXERS[kind].part("megatron_module").TRANSFORMER_FIELDS, getattr(arch.geometry, kind, None)
        fields |= {field: getattr(g, name) for field, name in table.items()}
    return fields


# Fusions that need TransformerEngine, Apex or a CUDA build.
UNFUSED = dict(
    bias_dropout_fusion=False, bias_activation_fusion=False, gradient_accumulation_fusion=False,
    persist_layer_norm=False, apply_rope_fusion=False, masked_softmax_fusion=False,
)  # fmt: skip


def build_model(arch: Architecture, config: TransformerConfig, *, padded_vocab_size: int | None = None,
                pre_process: bool = True, post_process: bool = True, pg_collection=None, vp_stage=None,
                backend: str = "local", linear_cp: str = "auto",
                mlp_block: int | None = None) -> HybridModel:  # fmt: skip
    """Return this rank's part of the model. ``config`` holds ``model_fields(arch)`` and the parallel layout."""
    check_installed("megatron")
    pp = config.pipeline_model_parallel_size
    stages = pp * (config.virtual_pipeline_model_parallel_size or 1)
    return HybridModel(
        config, stack_spec(arch, backend, linear_cp, mlp_block), vocab_size=padded_vocab_size or arch.vocab_size,
        max_sequence_length=arch.max_position_embeddings, hybrid_layer_pattern=arch.plan.pattern(stages),
        pre_process=pre_process, post_process=post_process, parallel_output=True,
        share_embeddings_and_output_weights=arch.tie_word_embeddings,
        position_embedding_type="none", vp_stage=vp_stage,  # our attention rotates its own queries and keys
        pg_collection=pg_collection or ProcessGroupCollection.use_mpu_process_groups(),
    )  # fmt: skip
