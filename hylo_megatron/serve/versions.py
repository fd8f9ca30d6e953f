"""What vLLM 0.26 lacks and 0.32 has; harmless where it is there."""

from vllm.platforms import current_platform
from vllm.v1.attention.backends.gdn_attn import GDNAttentionBackend, GDNAttentionMetadataBuilder
from vllm.v1.attention.backends.mamba2_attn import Mamba2AttentionBackend, Mamba2AttentionMetadataBuilder
from vllm.v1.attention.backends.utils import mamba_get_block_table_tensor


def sound_chunk_scan() -> None:
    """Takes from Mamba-2's scan the tilings that Triton miscompiles on Hopper, which give rows of NaN.

    vLLM 0.32 leaves them out itself; 0.26 tries them and may find one of them fastest. With whole warp groups and
    64 rows or more the product runs as wgmma on registers, which the next iteration of a pipelined loop overwrites.
    """
    from vllm.model_executor.layers.mamba.ops import ssd_chunk_scan

    if hasattr(ssd_chunk_scan, "_drop_racy_wgmma_configs") or not current_platform.is_device_capability(90):
        return
    tuner = ssd_chunk_scan._chunk_scan_fwd_kernel
    tuner.configs = [c for c in tuner.configs if c.num_stages == 1 or c.num_warps % 4 or c.kwargs["BLOCK_SIZE_M"] % 64]


class FreshStates:
    """Lets requests that begin with a single token start as decoded tokens from states of zeros.

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
            self.clear(slots[first.to(slots.device)])
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
