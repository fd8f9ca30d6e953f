"""MLA on vLLM's MLAAttention, or, with a norm on its keys, on ordinary attention over expanded keys and values.

Legend: T tokens of all requests together, H this rank's heads, K nope + rope dimensions, P rotary ones.
"""

import torch
from torch import Tensor, nn
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention, MLAAttention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear

from hylo_megatron.config.positions import rotary_width
from hylo_megatron.kernels.rope import Angles, cos_and_sin, query_scale, rope_frequencies, scaled, turn
from hylo_megatron.kernels.window import far_positions
from hylo_megatron.mixers.serving import trained_geometry
from hylo_megatron.mixers.vllm_weights import pad
from hylo_megatron.mixers.vllm_window import Positions


class Rotation(nn.Module):
    """``Angles`` of positions ``[T]``, tensors ``[T, 1, ..]``. Pairs of padding do not turn."""

    def __init__(self, config):
        super().__init__()
        self.rotates, self.log_scale, self.linear_rope = config.mla_rope, config.log_scale, config.linear_rope
        trained = trained_geometry(config)
        self._keep("frequencies", config, trained.mla.qk_rope_head_dim, config.qk_rope_head_dim // 2)
        if self.linear_rope:
            width = rotary_width(config.linear_type, trained)
            self._keep("linear_frequencies", config, width, width // 2)
        self.window = config.window
        if self.window:
            self._keep("window_frequencies", config, config.head_dim, config.head_dim // 2)

    def _keep(self, name: str, config, width: int, pairs: int) -> None:
        """Keep the frequencies of a head of ``width``, padded to ``pairs``, as a buffer."""
        parameters, longest = config.rope_parameters, config.max_position_embeddings
        frequencies, self.scaling = rope_frequencies(parameters, width, longest)
        padded = pad(frequencies, 0, pairs).to(torch.get_default_device())
        self.register_buffer(name, padded, persistent=False)

    def forward(self, positions_T: Tensor) -> Angles:
        positions, mla, linear = positions_T.unsqueeze(1), (None, None), (None, None)
        if self.rotates:
            mla = cos_and_sin(positions, self.frequencies, self.scaling)
        if self.linear_rope:
            linear = cos_and_sin(positions, self.linear_frequencies, 1.0)  # a norm follows, or came before
        scale = query_scale(positions, self.log_scale) if self.log_scale else None
        return Angles(*mla, scale, *linear, self._window(positions) if self.window else None)

    def _window(self, positions_T1: Tensor) -> Positions:
        far_T1 = far_positions(positions_T1, self.window)
        tables = (cos_and_sin(at, self.window_frequencies, self.scaling) for at in (positions_T1, far_T1))
        return Positions(positions_T1.squeeze(1), *(table for pair in tables for table in pair))


class HyLoMLA(nn.Module):
    """MLA without latent norms, at the served sizes; scale and output projection are of the trained ones."""

    def __init__(self, config, vllm_config, prefix: str):
        super().__init__()
        self.config = config
        quant, trained = vllm_config.quant_config, trained_geometry(config).mla
        heads, self.value_dim = config.num_attention_heads, trained.v_head_dim
        self.heads = heads // get_tensor_model_parallel_world_size()
        self.key_dim = config.qk_nope_head_dim + config.qk_rope_head_dim

        def linear(kind, inner: int, outer: int, name: str):
            return kind(inner, outer, bias=False, quant_config=quant, prefix=f"{prefix}.{name}")

        hidden, rank = config.hidden_size, config.q_lora_rank
        if rank:
            self.q_a_proj = linear(ReplicatedLinear, hidden, rank, "q_a_proj")
            self.q_b_proj = linear(ColumnParallelLinear, rank, heads * self.key_dim, "q_b_proj")
        else:
            self.q_proj = linear(ColumnParallelLinear, hidden, heads * self.key_dim, "q_proj")
        row = config.kv_lora_rank + config.qk_rope_head_dim
        self.kv_a_proj_with_mqa = linear(ReplicatedLinear, hidden, row, "kv_a_proj_with_mqa")
        self.kv_b_proj = linear(
            ColumnParallelLinear,
            config.kv_lora_rank,
            heads * (config.qk_nope_head_dim + config.v_head_dim),
            "kv_b_proj",
        )
        self.o_proj = linear(RowParallelLinear, heads * self.value_dim, hidden, "o_proj")
        scale = (trained.qk_nope_head_dim + trained.qk_rope_head_dim) ** -0.5
        common = dict(cache_config=vllm_config.cache_config, quant_config=quant, prefix=f"{prefix}.attn")
        if config.qk_norm:
            self.q_norm, self.k_norm = (RMSNorm(self.key_dim, eps=config.rms_norm_eps) for _ in range(2))
            self.attn = Attention(self.heads, config.expanded_head_size, scale, self.heads, **common)
        else:
            self.attn = MLAAttention(
                num_heads=self.heads,
                scale=scale,
                qk_nope_head_dim=config.qk_nope_head_dim,
                qk_rope_head_dim=config.qk_rope_head_dim,
                v_head_dim=config.v_head_dim,
                q_lora_rank=rank,
                kv_lora_rank=config.kv_lora_rank,
                kv_b_proj=self.kv_b_proj,
                **common,
                **_backend(vllm_config),
            )

    def mix(self, hidden_TD: Tensor, angles: Angles) -> Tensor:
        return self(hidden_TD, angles)

    def derive(self, name: str, loaded: set[str], dtype: torch.dtype) -> None:
        """Compute anew, in place, what vLLM's latent attention derived from ``kv_b_proj`` when it started."""
        if f"{name}.kv_b_proj.weight" in loaded and not self.config.qk_norm:
            self.attn.process_weights_after_loading(dtype)

    def forward(self, hidden_TD: Tensor, angles: Angles) -> Tensor:
        config = self.config
        if config.q_lora_rank:
            query, _ = self.q_b_proj(self.q_a_proj(hidden_TD)[0])
        else:
            query, _ = self.q_proj(hidden_TD)
        query_THK = query.unflatten(-1, (self.heads, self.key_dim))
        latent, k_rope = self.kv_a_proj_with_mqa(hidden_TD)[0].split(
            [config.kv_lora_rank, config.qk_rope_head_dim], -1
        )
        attend = self._expanded if config.qk_norm else self._latent
        out_THV = attend(query_THK, latent.contiguous(), k_rope.unsqueeze(1), angles)
        return self.o_proj(out_THV[..., : self.value_dim].flatten(1))[0]

    def _turn(self, x_THK: Tensor, angles: Angles) -> Tensor:
        if angles.cos is None:
            return x_THK
        nope, rope = x_THK.split([self.config.qk_nope_head_dim, self.config.qk_rope_head_dim], -1)
        return torch.cat([nope, turn(rope, angles.cos, angles.sin)], -1)

    def _query(self, query_THK: Tensor, angles: Angles) -> Tensor:
        turned = self._turn(query_THK, angles)
        return turned if angles.scale is None else scaled(turned, angles.scale)

    def _latent(self, query_THK, latent, k_rope, angles) -> Tensor:
        width = self.config.v_head_dim
        shape = (latent.shape[0], self.heads * width)
        k_rope = k_rope.contiguous() if angles.cos is None else turn(k_rope, angles.cos, angles.sin)
        out = self.attn(self._query(query_THK, angles), latent, k_rope, output_shape=shape)
        return out.unflatten(-1, (self.heads, width))

    def _expanded(self, query_THK, latent, k_rope, angles) -> Tensor:
        config = self.config
        kv = self.kv_b_proj(latent)[0].unflatten(-1, (self.heads, -1))
        k_nope, value = kv.split([config.qk_nope_head_dim, config.v_head_dim], -1)
        key = torch.cat([k_nope, k_rope.expand(-1, self.heads, -1)], -1)
        query, key = self.q_norm(query_THK.contiguous()), self.k_norm(key.contiguous())
        parts = self._query(query, angles), self._turn(key, angles), value
        out = self.attn(*(pad(part, -1, config.expanded_head_size).flatten(1) for part in parts))
        return out.unflatten(-1, (self.heads, config.expanded_head_size))


def _backend(vllm_config) -> dict:
    if vllm_config.device_config.device_type != "cpu":
        return {}
    from hylo_megatron.mixers.mla.vllm_cpu import LatentBackend

    return {"attn_backend": LatentBackend}


LAYER = HyLoMLA
