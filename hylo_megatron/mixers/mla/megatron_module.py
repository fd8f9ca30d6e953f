"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) without norms on the latents.

Legend: S sequence, B batch, D model, H heads of this rank, R latent rank, P rope, K nope + rope, V value dims.
Tensor parallelism: down-projections are replicated (a few hundred columns need not divide by the ranks),
up-projections are split by heads. Under sequence parallelism the latents are gathered, not the hidden states. Under
context parallelism the ranks exchange latents (``parallel/attention.py``).
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from torch import Tensor, nn

from hylo_megatron.config import Architecture
from hylo_megatron.config.layout import check_exchange
from hylo_megatron.config.positions import LogScale
from hylo_megatron.kernels.rope import query_scale, scaled
from hylo_megatron.mixers.megatron_attention import refuse_packed
from hylo_megatron.mixers.megatron_layers import Backend, HeadRMSNorm, ReplicatedLinear, Rotary, transformer_layer
from hylo_megatron.parallel.attention import Shared, attention_across_ranks
from hylo_megatron.parallel.zigzag import zigzag_positions

TRANSFORMER_FIELDS: dict[str, str] = {}  # megatron-core's own MLA is not used


def layer_spec(backend: Backend, arch: Architecture, linear_cp: str = "auto") -> ModuleSpec:
    """Return the spec of the layer that holds this mixer."""
    params = {"arch": arch, "backend": backend, "window": backend.window_beside("mla", arch)}
    if arch.mla_rope:
        params["rotary"] = Rotary(arch, arch.geometry.mla.qk_rope_head_dim)  # one for all layers
    if arch.log_scale:
        params["scale"] = QueryScale(arch.log_scale)
    return transformer_layer(backend, ModuleSpec(module=MLASelfAttention, params=params))


class QueryScale:
    """The factor of queries that grows with their position. All layers share one, with a table for each length."""

    def __init__(self, log_scale: LogScale):
        self.log_scale, self.tables = log_scale, {}

    def __call__(self, q_SBHK: Tensor, ranks: int, rank: int) -> Tensor:
        """Return queries at the positions of a context-parallel rank, multiplied."""
        key = (len(q_SBHK), ranks, rank, q_SBHK.device)
        if key not in self.tables:
            self.tables[key] = query_scale(zigzag_positions(*key[:3]), self.log_scale).to(q_SBHK.device)
        return scaled(q_SBHK, self.tables[key][:, None, None])


class MLASelfAttention(MegatronModule):
    """``hidden_SBD -> (out_SBD, None)``, a ``self_attention`` of megatron's ``TransformerLayer``.

    ``arch.mla_qk_norm`` keeps Qwen3's per-head norms, over the nope and rope dimensions together, before the rotation.
    The output of ``window`` is added where the model has one beside MLA layers.
    """

    def __init__(self, config, layer_number, arch: Architecture, backend: Backend, rotary: Rotary | None = None,
                 scale: QueryScale | None = None, pg_collection=None, cp_comm_type: str | None = None,
                 window: Callable | None = None, **_):  # fmt: skip
        super().__init__(config)
        check_exchange(cp_comm_type)
        geometry = arch.geometry.mla
        self.mode, self.cp_group = cp_comm_type, pg_collection.cp
        self.geometry, self.layer_number, self.tp_group = geometry, layer_number, pg_collection.tp
        heads, self.key_dim = config.num_attention_heads, geometry.qk_nope_head_dim + geometry.qk_rope_head_dim
        self.local_heads = heads // pg_collection.tp.size()

        column = partial(backend.column, config=config, tp_group=pg_collection.tp)
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
        self.linear_proj = backend.row(heads * geometry.v_head_dim, config.hidden_size, config, pg_collection.tp)
        self.q_norm = self.k_norm = None
        if arch.mla_qk_norm:
            self.q_norm = HeadRMSNorm(config, self.key_dim, config.layernorm_epsilon)
            self.k_norm = HeadRMSNorm(config, self.key_dim, config.layernorm_epsilon)
        self.rotary, self.scale = rotary, scale
        self.core_attention = build_module(
            backend.core_attention, config=config, layer_number=layer_number, attn_mask_type=None,
            attention_type="self", softmax_scale=self.key_dim**-0.5, pg_collection=pg_collection,
        )  # fmt: skip
        self.window = window and window(config, layer_number=layer_number, pg_collection=pg_collection)

    def project_query(self, hidden_SBD: Tensor) -> Tensor:
        if self.geometry.q_lora_rank:
            q, _ = self.linear_q_up_proj(self.linear_q_down_proj(hidden_SBD))
        else:
            q, _ = self.linear_q_proj(hidden_SBD)
        return q.unflatten(-1, (self.local_heads, self.key_dim))

    def project_latent(self, hidden_SBD: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``(latent_SBR, k_rope_SBP)``: what a cache would hold, but the key is not rotated yet."""
        g = self.geometry
        latent_SBR, k_rope_SBP = self.linear_kv_down_proj(hidden_SBD).split([g.kv_lora_rank, g.qk_rope_head_dim], -1)
        return latent_SBR.contiguous(), self._of_all_ranks(k_rope_SBP)  # NCCL gathers no views

    def _of_all_ranks(self, x_SBR: Tensor) -> Tensor:
        """Return the complete sequence for this rank's heads; the gradient is summed over tensor-parallel ranks."""
        shared = self.config.sequence_parallel
        of_all = gather_from_sequence_parallel_region if shared else copy_to_tensor_model_parallel_region
        return of_all(x_SBR, group=self.tp_group)

    def expand_latent(
        self, kv: Tensor, k_rope_SBP: Tensor, rank: int, part: tuple[int, slice] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return ``(k_SBHK, v_SBHV)`` of up-projected latents ``kv`` at the positions of context-parallel ``rank``.

        ``part``: how many tokens the rank has, and which of these are given (default: all).
        """
        g = self.geometry
        kv = kv.unflatten(-1, (self.local_heads, g.qk_nope_head_dim + g.v_head_dim))
        k_nope, v_SBHV = kv.split([g.qk_nope_head_dim, g.v_head_dim], -1)
        k_rope = k_rope_SBP.unsqueeze(2).expand(-1, -1, self.local_heads, -1)
        k_SBHK = torch.cat([k_nope, k_rope], -1)
        if self.k_norm is not None:
            k_SBHK = self.k_norm(k_SBHK)
        return self._rotate(k_SBHK, rank, part), v_SBHV

    def forward(self, hidden_states: Tensor, attention_mask=None, packed_seq_params=None, **_):
        refuse_packed(packed_seq_params)
        out_SBD, bias = self.mix(hidden_states)
        return (out_SBD if self.window is None else out_SBD + self.window(hidden_states)), bias

    def mix(self, hidden_states: Tensor) -> tuple[Tensor, None]:
        """Return the output without the window's."""
        q_SBHK, rank = self.project_query(hidden_states), self.cp_group.rank()
        if self.q_norm is not None:
            q_SBHK = self.q_norm(q_SBHK)
        q_SBHK = self._rotate(q_SBHK, rank)
        if self.scale is not None:
            q_SBHK = self.scale(q_SBHK, self.cp_group.size(), rank)
        latent_SBR, k_rope_SBP = self.project_latent(hidden_states)
        if self.cp_group.size() > 1:
            return self.linear_proj(self._attend_across_ranks(q_SBHK, latent_SBR, k_rope_SBP))
        kv, _ = self.linear_kv_up_proj(latent_SBR)
        return self.linear_proj(self.core_attention(q_SBHK, *self.expand_latent(kv, k_rope_SBP, rank)))

    def _attend_across_ranks(self, q_SBHK: Tensor, latent_SBR: Tensor, k_rope_SBP: Tensor) -> Tensor:
        """Return ``[S, B, H*V]``, attention from this rank's queries to the latents of all context-parallel ranks."""
        latents, g = torch.cat([self._of_all_ranks(latent_SBR), k_rope_SBP], -1), self.geometry
        weight, length = self.linear_kv_up_proj.weight, len(q_SBHK)

        def expand(latents: Tensor, rank: int, keys: slice) -> tuple[Tensor, Tensor]:
            latent, k_rope = latents.split([g.kv_lora_rank, g.qk_rope_head_dim], -1)
            k, v = self.expand_latent(nn.functional.linear(latent, weight), k_rope, rank, (length, keys))
            return k.permute(1, 2, 0, 3), v.permute(1, 2, 0, 3)

        norms = () if self.k_norm is None else (self.k_norm.weight,)
        shared = Shared(
            group=self.cp_group, scale=self.key_dim**-0.5, expand=expand, parameters=(weight, *norms), mode=self.mode,
            values=self.local_heads * (self.key_dim + g.v_head_dim),
        )  # fmt: skip
        out_BHSV = attention_across_ranks(q_SBHK.permute(1, 2, 0, 3), latents, shared)
        return out_BHSV.permute(2, 0, 1, 3).flatten(2)

    def _rotate(self, x_SBHK: Tensor, rank: int, part: tuple[int, slice] | None = None) -> Tensor:
        if self.rotary is None:
            return x_SBHK
        length, tokens = part or (len(x_SBHK), slice(None))
        nope, rope = x_SBHK.split([self.geometry.qk_nope_head_dim, self.geometry.qk_rope_head_dim], -1)
        return torch.cat([nope, self.rotary(rope, self.cp_group.size(), rank, length, tokens)], -1)
