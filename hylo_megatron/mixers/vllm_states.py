"""Builders of attention metadata that clear the states of new requests: vLLM 0.26 does not, and 0.32 does."""

from vllm.v1.attention.backends.gdn_attn import GDNAttentionBackend, GDNAttentionMetadataBuilder
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionBackend, Mamba2AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor


class FreshStates:
    """Let requests that begin with a single token start as decoded tokens from states of zeros.

    vLLM 0.26 runs such prompts as decoded tokens without clearing what the slot's last owner left: Gated DeltaNet
    always (vllm-project/vllm#51562), Mamba-2 where the step's shape selects a CUDA graph of decoding.
    """

    supports_update_block_table = False  # metadata that another group's builder made: no look at these states

    def __init__(self, kv_cache_spec, layer_names, vllm_config, device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        self.layer_names, self.vllm_config = layer_names, vllm_config  # 0.26 does not keep both

    def build(self, common_prefix_len, common_attn_metadata, *args, **kwargs):
        m = common_attn_metadata
        first = (m.seq_lens_cpu_upper_bound == 1).nonzero()[:, 0]
        if len(first):
            mode = self.vllm_config.cache_config.mamba_cache_mode
            slots = mamba_get_block_table_tensor(m.block_table_tensor, m.seq_lens, self.kv_cache_spec, mode)[:, 0]
            self.clear(slots[first.to(slots.device, non_blocking=True)])  # the host must not wait here
            if m.is_prefilling is not None:
                m = m.replace(is_prefilling=m.is_prefilling.index_fill(0, first, False))
        return super().build(common_prefix_len, m, *args, **kwargs)

    def clear(self, slots) -> None:
        layers = self.vllm_config.compilation_config.static_forward_context
        for name in self.layer_names:
            for state in layers[name].kv_cache:
                state[slots] = 0


class GDNBuilder(FreshStates, GDNAttentionMetadataBuilder):
    pass


class Mamba2Builder(FreshStates, Mamba2AttentionMetadataBuilder):
    pass


class GDNBackend(GDNAttentionBackend):
    @staticmethod
    def get_builder_cls():
        return GDNBuilder


class Mamba2Backend(Mamba2AttentionBackend):
    @staticmethod
    def get_builder_cls():
        return Mamba2Builder
