"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) without norms on the latents.

Legend: S sequence, B batch, D model, H heads of this rank, R latent rank, P rope, K nope + rope, V value dims.
Tensor parallelism: down-projections are replicated (a few hundred columns need not divide by the ranks),
up-projections split by heads. Under sequence parallelism the latents are gathered, not the hidden states.
"""

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import build_module
from torch import Tensor, nn

from hylo_megatron.config import MLAGeometry
from hylo_megatron.layers.norm import HeadRMSNorm
from hylo_megatron.layers.rope import Rotary


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


class MLASelfAttention(MegatronModule):
    """``hidden_SBD -> (out_SBD, None)``, a ``self_attention`` of megatron's ``TransformerLayer``.

    ``qk_norm`` keeps Qwen3's per-head norms, over the nope and rope dimensions together, before the rotation.
    """

    def __init__(self, config, layer_number, geometry: MLAGeometry, rope_parameters: dict, max_positions: int,
                 column_linear, row_linear, core_attention, qk_norm=False, pg_collection=None, **_):  # fmt: skip
        super().__init__(config)
        self.geometry, self.layer_number, self.tp_group = geometry, layer_number, pg_collection.tp
        heads, self.key_dim = config.num_attention_heads, geometry.qk_nope_head_dim + geometry.qk_rope_head_dim
        self.local_heads = heads // pg_collection.tp.size()

        def column(inputs, outputs):
            return build_module(
                column_linear, inputs, outputs, config=config, init_method=config.init_method, gather_output=False,
                bias=False, skip_bias_add=False, is_expert=False, tp_group=pg_collection.tp,
            )  # fmt: skip

        if geometry.q_lora_rank:
            self.linear_q_down_proj = ReplicatedLinear(config.hidden_size, geometry.q_lora_rank, config)
            self.linear_q_up_proj = column(geometry.q_lora_rank, heads * self.key_dim)
        else:
            self.linear_q_proj = column(config.hidden_size, heads * self.key_dim)
        latent = geometry.kv_lora_rank + geometry.qk_rope_head_dim
        self.linear_kv_down_proj = ReplicatedLinear(config.hidden_size, latent, config)
        self.linear_kv_up_proj = column(
            geometry.kv_lora_rank, heads * (geometry.qk_nope_head_dim + geometry.v_head_dim)
        )
        self.linear_proj = build_module(
            row_linear, heads * geometry.v_head_dim, config.hidden_size, config=config,
            init_method=config.output_layer_init_method, bias=False, input_is_parallel=True, skip_bias_add=True,
            is_expert=False, tp_group=pg_collection.tp,
        )  # fmt: skip
        self.q_norm = HeadRMSNorm(config, self.key_dim, config.layernorm_epsilon) if qk_norm else None
        self.k_norm = HeadRMSNorm(config, self.key_dim, config.layernorm_epsilon) if qk_norm else None
        self.rotary = Rotary(rope_parameters, geometry.qk_rope_head_dim, max_positions)
        self.core_attention = build_module(
            core_attention, config=config, layer_number=layer_number, attn_mask_type=None, attention_type="self",
            softmax_scale=self.key_dim**-0.5, pg_collection=pg_collection,
        )  # fmt: skip

    def project_query(self, hidden_SBD: Tensor) -> Tensor:
        if self.geometry.q_lora_rank:
            q, _ = self.linear_q_up_proj(self.linear_q_down_proj(hidden_SBD))
        else:
            q, _ = self.linear_q_proj(hidden_SBD)
        return q.unflatten(-1, (self.local_heads, self.key_dim))

    def project_latent(self, hidden_SBD: Tensor) -> tuple[Tensor, Tensor]:
        """``(latent_SBR, k_rope_SBP)``: what a cache would hold, the key not yet rotated."""
        g = self.geometry
        latent_SBR, k_rope_SBP = self.linear_kv_down_proj(hidden_SBD).split([g.kv_lora_rank, g.qk_rope_head_dim], -1)
        if self.config.sequence_parallel:
            k_rope_SBP = gather_from_sequence_parallel_region(k_rope_SBP, group=self.tp_group)
        else:
            k_rope_SBP = copy_to_tensor_model_parallel_region(k_rope_SBP, group=self.tp_group)
            latent_SBR = latent_SBR.contiguous()
        return latent_SBR, k_rope_SBP

    def forward(self, hidden_states: Tensor, attention_mask=None, **_):
        g = self.geometry
        q_SBHK = self.project_query(hidden_states)
        latent_SBR, k_rope_SBP = self.project_latent(hidden_states)
        kv, _ = self.linear_kv_up_proj(latent_SBR)
        kv = kv.unflatten(-1, (self.local_heads, g.qk_nope_head_dim + g.v_head_dim))
        k_nope, v_SBHV = kv.split([g.qk_nope_head_dim, g.v_head_dim], -1)
        k_rope = k_rope_SBP.unsqueeze(2).expand(-1, -1, self.local_heads, -1)
        k_SBHK = torch.cat([k_nope, k_rope], -1)
        if self.q_norm is not None:
            q_SBHK, k_SBHK = self.q_norm(q_SBHK), self.k_norm(k_SBHK)
        q_SBHK, k_SBHK = (self._rotate(x) for x in (q_SBHK, k_SBHK))
        return self.linear_proj(self.core_attention(q_SBHK, k_SBHK, v_SBHV))

    def _rotate(self, x_SBHK: Tensor) -> Tensor:
        nope, rope = x_SBHK.split([self.geometry.qk_nope_head_dim, self.geometry.qk_rope_head_dim], -1)
        return torch.cat([nope, self.rotary(rope, self.core_attention.cp_group)], -1)
