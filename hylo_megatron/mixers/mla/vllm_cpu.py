"""Latent attention of any size on a CPU, which vLLM's CPU build lacks: one request after another, in torch.

Legend: T tokens of all requests, L one request's positions so far, H heads, R latent + rotary values of a cached row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonMetadataBuilder
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from hylo_megatron.mixers.vllm_weights import pad


class AnyHeadSize(MLACommonMetadata):
    def __post_init__(self):
        """Leave out the base class's check of sizes, which are those of GPU kernels."""


class Builder(MLACommonMetadataBuilder[AnyHeadSize]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, **kwargs):
        kwargs["metadata_cls"] = AnyHeadSize
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)

    def build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
        common = common_attn_metadata
        metadata = super().build(common_prefix_len, common, *args, **kwargs)
        starts, lengths = common.query_start_loc.tolist(), common.seq_lens.tolist()
        metadata.requests = [
            (starts[r], starts[r + 1], lengths[r], common.block_table_tensor[r]) for r in range(len(lengths))
        ]
        return metadata


class LatentBackend(CPUMLABackend):
    @classmethod
    def get_supported_head_sizes(cls) -> list[int]:
        return []  # any

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list:
        return [MultipleOf(16)]

    @classmethod
    def supports_block_size(cls, block_size) -> bool:
        return block_size is None or block_size % 16 == 0

    @staticmethod
    def get_name() -> str:
        return "HYLO_CPU_MLA"

    @staticmethod
    def get_impl_cls():
        return LatentAttention

    @staticmethod
    def get_builder_cls():
        return Builder


class LatentAttention(CPUMLAImpl):
    def forward_mha(
        self, q, kv_c_normed, k_pe, kv_c_and_k_pe_cache, attn_metadata, k_scale, output, output_scale=None
    ):
        """Attend from prompts, or chunks of them, with keys and values of every head."""
        first = attn_metadata.num_decode_tokens
        for start, end, length, blocks in attn_metadata.requests[attn_metadata.num_decodes :]:
            rows_LR = _cached(kv_c_and_k_pe_cache, blocks, length).to(q.dtype)
            latent, k_rope = rows_LR.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
            kv = self.kv_b_proj(latent.contiguous())[0].unflatten(-1, (self.num_heads, -1))
            k_nope, value = kv.split([self.qk_nope_head_dim, self.v_head_dim], -1)
            key = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, self.num_heads, -1)], -1)
            # torch's flash kernel takes one width; its other kernels make [S, L] scores.
            width = max(key.shape[-1], self.v_head_dim)
            parts = (q[start - first : end - first], key, value)
            query, key, value = (pad(part, -1, width).transpose(0, 1).unsqueeze(0) for part in parts)
            new = end - start
            mask = None if new == length else torch.ones(new, length, dtype=torch.bool).tril(length - new)
            out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=self.scale)
            output[start - first : end - first] = out[0, ..., : self.v_head_dim].transpose(0, 1).flatten(1)

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        """Attend from one token of each request, in latent space."""
        query_BHR = torch.cat(q, -1) if isinstance(q, tuple) else q
        out_BHR = query_BHR.new_zeros(*query_BHR.shape[:2], self.kv_lora_rank)
        for row, (_, _, length, blocks) in enumerate(attn_metadata.requests[: attn_metadata.num_decodes]):
            rows_LR = _cached(kv_c_and_k_pe_cache, blocks, length).to(query_BHR.dtype)
            query, key = query_BHR[row][None, None], rows_LR[None, None]
            value = pad(key[..., : self.kv_lora_rank], -1, key.shape[-1])
            out = F.scaled_dot_product_attention(query, key, value, scale=self.scale)
            out_BHR[row] = out[0, 0, :, : self.kv_lora_rank]
        return out_BHR, None

    def do_kv_cache_update(self, kv_c_normed, k_pe, kv_cache, slot_mapping, kv_cache_dtype, k_scale) -> None:
        if not kv_cache.numel():
            return
        slots, size = slot_mapping.flatten().long(), kv_cache.shape[1]
        kept = slots >= 0
        rows = torch.cat([kv_c_normed, k_pe.flatten(1)], -1)[: len(slots)][kept].to(kv_cache.dtype)
        kv_cache[slots[kept] // size, slots[kept] % size] = rows  # the cache may be a view with gaps


def _cached(cache: Tensor, blocks: Tensor, length: int) -> Tensor:
    """Return a request's rows ``[L, R]`` from its blocks ``[blocks, positions, R]``."""
    wanted = blocks[: -(-length // cache.shape[1])].long()
    return cache[wanted].flatten(0, 1)[:length]
