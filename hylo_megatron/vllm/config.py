"""What vLLM is told of a hybrid: its geometry as the engine runs it, and settings that fit it."""

import os

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from hylo_megatron.config import Geometry
from hylo_megatron.hf.configuration_hylo import HyLoConfig
from hylo_megatron.vllm.geometry import Served, serve

logger = init_logger("vllm.hylo_megatron")  # below vllm's own logger, so that its level and format apply
# Tests run a GPU's geometry on a CPU with it.
GEOMETRY_OF = "HYLO_SERVE_GEOMETRY"


def on_gpu() -> bool:
    return os.environ.get(GEOMETRY_OF, "cpu" if current_platform.is_cpu() else "gpu") == "gpu"


def apply(config: HyLoConfig) -> None:
    """Puts the served geometry in the place of the trained one, which moves to ``config.trained_geometry``: vLLM reads
    sizes from many places. Once only: a config is copied and sent to other processes afterwards."""
    if getattr(config, "trained_geometry", None):
        return
    trained = config.geometry()
    found: Served = serve(trained, set(config.mixers), config.num_attention_heads, config.qk_norm, on_gpu())
    for note in found.notes:
        logger.info_once("HyLo: %s.", note)
    config.trained_geometry, config.expanded_head_size = trained.to_dict(), found.expanded
    mla, gdn = found.geometry.mla, found.geometry.gdn
    config.kv_lora_rank, config.qk_rope_head_dim = mla.kv_lora_rank, mla.qk_rope_head_dim
    config.qk_nope_head_dim, config.v_head_dim = mla.qk_nope_head_dim, mla.v_head_dim
    config.linear_num_value_heads, config.linear_value_head_dim = gdn.num_value_heads, gdn.value_head_dim


def trained_geometry(config: HyLoConfig) -> Geometry:
    return Geometry.from_dict(config.trained_geometry)


class HyLoArchConvertor(ModelArchConfigConvertorBase):
    """vLLM takes latents for known model types only and guesses the rotary size where it equals the other."""

    def __init__(self, hf_config, hf_text_config, *args, **kwargs):
        super().__init__(hf_config, hf_text_config, *args, **kwargs)
        apply(hf_text_config)

    def is_deepseek_mla(self) -> bool:
        return "mla" in self.hf_text_config.mixers and not self.hf_text_config.expanded_head_size

    def _get_qk_rope_head_dim(self) -> int:
        return self.hf_text_config.qk_rope_head_dim

    def get_head_size(self) -> int:
        return self.hf_text_config.expanded_head_size or super().get_head_size()

    def get_total_num_kv_heads(self) -> int:
        return self.hf_text_config.num_attention_heads


class EngineSettings(VerifyAndUpdateConfig):
    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """States in fp32, as in training, unless the user says otherwise; kernels that take our head sizes."""
        config, cache = vllm_config.model_config.hf_config, vllm_config.cache_config
        if cache.mamba_ssm_cache_dtype == "auto":
            cache.mamba_ssm_cache_dtype = "float32"
        if current_platform.is_cpu():  # vLLM takes it back for latents on a CPU, but too late for its block sizes
            cache.enable_prefix_caching = False
        options = vllm_config.additional_config
        if isinstance(options, dict) and config.linear_key_head_dim != 128:
            options.setdefault("gdn_prefill_backend", "triton")  # FlashInfer's is made for 128, and vLLM does not ask
