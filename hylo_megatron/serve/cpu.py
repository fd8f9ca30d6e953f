"""What vLLM's CPU build lacks: latent attention of any size, and Gated DeltaNet in fp32 or with heads of any shape.

One request after another, in torch: for tests and small use. Legend: T tokens of all requests, L one request's
positions so far, H heads, R latent + rotary values of a cached row.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention.mla_attention import MLACommonMetadata, MLACommonMetadataBuilder
from vllm.model_executor.layers.linear import UnquantizedLinearMethod
from vllm.model_executor.layers.mamba.mamba_utils import is_conv_state_dim_first
from vllm.model_executor.layers.mamba.ops.cpu.gdn_attention import _unpacked_conv_weight
from vllm.model_executor.layers.vocab_parallel_embedding import UnquantizedEmbeddingMethod
from vllm.v1.attention.backend import MultipleOf
from vllm.v1.attention.backends.mla.cpu_mla import CPUMLABackend, CPUMLAImpl

from hylo_megatron.kernels import causal_conv1d, chunk_gated_delta_rule, l2norm, recurrent_gated_delta_rule
from hylo_megatron.serve.weights import pad


class PlainHead(UnquantizedEmbeddingMethod):
    def process_weights_after_loading(self, layer) -> None:
        """Leaves the weights as they are."""

    def apply(self, layer, x: Tensor, bias: Tensor | None = None) -> Tensor:
        return F.linear(x, layer.weight, bias)


def keep_weights(model: nn.Module) -> None:
    """Lets products read the model's parameters. vLLM's CPU build packs copies for its kernels, drops the parameters
    of linear layers and leaves those of the output head behind, so that updates would find no place, or no reader."""
    for module in model.modules():
        method = getattr(module, "quant_method", None)
        if isinstance(method, UnquantizedLinearMethod):
            module._cpu_skip_gemm_dispatch = True
        elif isinstance(method, UnquantizedEmbeddingMethod):
            module.quant_method = PlainHead()


class AnyHeadSize(MLACommonMetadata):
    def __post_init__(self):
        """Leaves out the base class's list of sizes, which are those of GPU kernels."""


class Builder(MLACommonMetadataBuilder[AnyHeadSize]):
    def __init__(self, kv_cache_spec, layer_names, vllm_config, device, **kwargs):
        kwargs["metadata_cls"] = AnyHeadSize
        super().__init__(kv_cache_spec, layer_names, vllm_config, device, **kwargs)

    def build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
        metadata, common = (
            super().build(common_prefix_len, common_attn_metadata, *args, **kwargs),
            common_attn_metadata,
        )
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
        """Prompts, or stretches of them: keys and values of every head written out."""
        first = attn_metadata.num_decode_tokens
        for start, end, length, blocks in attn_metadata.requests[attn_metadata.num_decodes :]:
            rows_LR = _cached(kv_c_and_k_pe_cache, blocks, length).to(q.dtype)
            latent, k_rope = rows_LR.split([self.kv_lora_rank, self.qk_rope_head_dim], -1)
            kv = self.kv_b_proj(latent.contiguous())[0].unflatten(-1, (self.num_heads, -1))
            k_nope, value = kv.split([self.qk_nope_head_dim, self.v_head_dim], -1)
            key = torch.cat([k_nope, k_rope.unsqueeze(1).expand(-1, self.num_heads, -1)], -1)
            width = max(
                key.shape[-1], self.v_head_dim
            )  # torch's flash kernel wants one width; others make [S, L] scores
            parts = (q[start - first : end - first], key, value)
            query, key, value = (pad(part, -1, width).transpose(0, 1).unsqueeze(0) for part in parts)
            new = end - start
            mask = None if new == length else torch.ones(new, length, dtype=torch.bool).tril(length - new)
            out = F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, scale=self.scale)
            output[start - first : end - first] = out[0, ..., : self.v_head_dim].transpose(0, 1).flatten(1)

    def forward_mqa(self, q, kv_c_and_k_pe_cache, attn_metadata, layer):
        """One token of each request, in latent space."""
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
    """``[L, R]``: a request's rows, from its blocks ``[blocks, positions, R]``."""
    wanted = blocks[: -(-length // cache.shape[1])].long()
    return cache[wanted].flatten(0, 1)[:length]


def gated_delta_net(layer, qkv_TC: Tensor, beta_TH: Tensor, decay_TH: Tensor, out_THV: Tensor) -> None:
    """Convolution and delta rule of each request from its cached states, which it replaces; fills ``out_THV``.

    ``layer``: a vLLM Gated DeltaNet layer; its state is kept as ``[slot, H, V, K]``.
    """
    metadata = get_forward_context().attn_metadata
    if metadata is None:  # the engine measures its memory
        return
    metadata = metadata[layer.prefix]
    conv_states, states = layer.kv_cache[:2]
    if is_conv_state_dim_first():
        conv_states = conv_states.transpose(1, 2)
    decodes, requests = metadata.num_decodes, metadata.num_decodes + metadata.num_prefills
    starts = metadata.non_spec_query_start_loc.tolist()
    slots = metadata.non_spec_state_indices_tensor.tolist()
    known = [True] * decodes + (metadata.has_initial_state[decodes:requests].tolist() if requests > decodes else [])
    weight_CW = _unpacked_conv_weight(layer)
    log_decay_TH = -layer.A_log.float().exp() * F.softplus(decay_TH.float() + layer.dt_bias.float())
    keys = layer.key_dim // layer.tp_size
    for request in range(requests):
        here, slot = slice(starts[request], starts[request + 1]), slots[request]
        before = dict(initial_state=conv_states[slot][None]) if known[request] else {}
        qkv, conv_state = causal_conv1d(qkv_TC[here][None], weight_CW, output_final_state=True, **before)
        q, k, v = qkv.split([keys, keys, qkv.shape[-1] - 2 * keys], -1)
        q, k = (l2norm(x.unflatten(-1, (-1, layer.head_k_dim))) for x in (q, k))
        state = states[slot].transpose(1, 2)[None].float() if known[request] else None
        rule = recurrent_gated_delta_rule if q.shape[1] == 1 else chunk_gated_delta_rule
        out, state = rule(
            q, k, v.unflatten(-1, (-1, layer.head_v_dim)), g=log_decay_TH[here][None],
            beta=beta_TH[here][None].sigmoid(), initial_state=state, output_final_state=True,
        )  # fmt: skip
        out_THV[here] = out[0].to(out_THV.dtype)
        conv_states[slot], states[slot] = (
            conv_state[0].to(conv_states.dtype),
            state[0].transpose(1, 2).to(states.dtype),
        )
