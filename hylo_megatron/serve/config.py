"""What vLLM is told of a hybrid: its geometry as the engine runs it, and settings that fit it."""

import os
from importlib.util import find_spec

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from hylo_megatron.config import Geometry
from hylo_megatron.errors import HyLoError
from hylo_megatron.hf.configuration_hylo import HyLoConfig
from hylo_megatron.planner.pages import expanded_bytes, pages
from hylo_megatron.serve.geometry import Served, serve

logger = init_logger("vllm.hylo_megatron")  # below vllm's own logger, so that its level and format apply
# Tests run a GPU's geometry on a CPU with it.
GEOMETRY_OF = "HYLO_SERVE_GEOMETRY"
WORKSPACE = 4 << 30  # bytes
SPLITS, SPLITS_SPACE = 128, 1 << 30  # about a GPU's multiprocessors; bytes
FP8_ROW = 576  # 512 + 64
FLASHINFER_HEAD = 128
# Methods of --quantization that need no quantised folder. vLLM's int8 ones leave linear layers as they are.
ONLINE_FP8 = ("fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel")
CPU_CACHES = ("auto", "bfloat16", "float16", "float32")
MAMBA_CHUNK = 256  # vLLM's default for a config without the field is Mamba-1's


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
    if not current_platform.is_cpu() and not getattr(config, "head_dtype", None):
        config.head_dtype = "float32"  # logits as the product sums them up: rounded to bf16, the best ones often tie
    mla, gdn = found.geometry.mla, found.geometry.gdn
    config.kv_lora_rank, config.qk_rope_head_dim = mla.kv_lora_rank, mla.qk_rope_head_dim
    config.qk_nope_head_dim, config.v_head_dim = mla.qk_nope_head_dim, mla.v_head_dim
    config.mamba_chunk_size = MAMBA_CHUNK
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
        refuse(vllm_config)
        cache = vllm_config.cache_config
        if cache.mamba_ssm_cache_dtype == "auto":
            cache.mamba_ssm_cache_dtype = "float32"
        if current_platform.is_cpu():  # vLLM takes it back for latents on a CPU, but too late for its block sizes
            cache.enable_prefix_caching = False
        if isinstance(vllm_config.additional_config, dict):
            kernel = prompt_kernel(vllm_config.model_config.hf_config)
            vllm_config.additional_config.setdefault("gdn_prefill_backend", kernel)
        # Products padded to aligned widths have padded rows, which the next compiled piece does not expect: Mamba-2's
        # projection with heads that are no multiple of 8 on a rank gave wrong tokens.
        vllm_config.compilation_config.inductor_compile_config.setdefault("shape_padding", False)
        config = vllm_config.model_config.hf_config
        if on_gpu() and "mla" in config.mixers and not config.expanded_head_size:
            limit_requests(vllm_config)
            spread_attention(vllm_config)
            refuse_fp8(vllm_config)


def refuse(vllm_config) -> None:
    """Raise ``HyLoError`` for options with which a hybrid would start, and then ignore them or give wrong tokens."""
    model, dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    weights = ONLINE_FP8[-1:] if current_platform.is_cpu() else ONLINE_FP8
    refused = (
        ("--speculative-config", vllm_config.speculative_config,
         "rejected drafts would stay in the recurrent states; leave it out"),
        ("--enable-lora", vllm_config.lora_config,
         "adapters are not applied; merge them into the weights (peft: merge_and_unload) and serve the result"),
        ("quantization_config in config.json", getattr(model.hf_config, "quantization_config", None),
         f"export the model unquantised, then choose --quantization {weights[0]}"),
        (f"--quantization {model.quantization}", model.quantization not in (None, *weights),
         f"expected {' or '.join(weights)}, with which vLLM quantises an exported folder while it loads"),
        ("--decode-context-parallel-size", vllm_config.parallel_config.decode_context_parallel_size > 1,
         "recurrent states cannot be split by position; use --tensor-parallel-size"),
        (f"--kv-cache-dtype {dtype}", current_platform.is_cpu() and dtype not in CPU_CACHES,
         f"a CPU keeps {', '.join(CPU_CACHES)}; leave it out"),
    )  # fmt: skip
    for option, given, advice in refused:
        if given:
            raise HyLoError(f"{option}: not supported for a hybrid: {advice}")


def prompt_kernel(config: HyLoConfig) -> str:
    """Gated DeltaNet's for prompts: what vLLM prefers, FlashInfer's on Hopper, where that takes these heads and is
    there. vLLM checks neither, and fails at the first request."""
    heads = {config.linear_key_head_dim, config.linear_value_head_dim}
    there = all(find_spec(name) for name in ("flashinfer", "cutlass"))
    return "auto" if heads == {FLASHINFER_HEAD} and there else "triton"


def limit_requests(vllm_config) -> None:
    """vLLM sets aside a page of expanded keys and values for each request that may run at once; a hybrid's pages are
    long, and with the default of 1,024 requests that alone may not fit."""
    config, scheduler = vllm_config.model_config.hf_config, vllm_config.scheduler_config
    tp, state = vllm_config.parallel_config.tensor_parallel_size, vllm_config.cache_config.mamba_ssm_cache_dtype
    heads, served = config.num_attention_heads, Served(config.geometry())
    block = pages(served, tuple(config.mixers), heads, state_itemsize=4 if state == "float32" else 2, tp=tp).block
    each = block * expanded_bytes(served, heads, tp=tp)
    fits = max(1, WORKSPACE // each)
    if scheduler.max_num_seqs > fits:
        logger.warning_once(
            "HyLo: at most %d requests run at once: %d would take %.0f GiB of work space (--mamba-ssm-cache-dtype"
            " bfloat16 halves it).", fits, scheduler.max_num_seqs, scheduler.max_num_seqs * each / 2**30,
        )  # fmt: skip
        scheduler.max_num_seqs = fits


def spread_attention(vllm_config) -> None:
    """With latents all heads of a request share one tile, so that decoding fills a GPU only by splitting the cache;
    vLLM's bound for CUDA graphs is 32 splits. Partial outputs, fp32, may take ``SPLITS_SPACE``."""
    config, attention = vllm_config.model_config.hf_config, vllm_config.attention_config
    heads = config.num_attention_heads // vllm_config.parallel_config.tensor_parallel_size
    each = 4 * heads * config.kv_lora_rank * vllm_config.scheduler_config.max_num_seqs
    if attention.flash_attn_max_num_splits_for_cuda_graph == 32:  # the default: nobody chose
        attention.flash_attn_max_num_splits_for_cuda_graph = max(32, min(SPLITS, SPLITS_SPACE // each))


def refuse_fp8(vllm_config) -> None:
    """vLLM would choose FlashMLA, start, and fail at the first request."""
    config, dtype = vllm_config.model_config.hf_config, str(vllm_config.cache_config.cache_dtype)
    row = config.kv_lora_rank + config.qk_rope_head_dim
    if dtype.startswith("fp8") and row != FP8_ROW and vllm_config.attention_config.backend is None:
        raise HyLoError(
            f"--kv-cache-dtype {dtype}: FlashMLA keeps rows of {FP8_ROW} values in 8 bits, this model's have {row};"
            " leave it out (caches in bf16), or choose a kernel with --attention-backend"
        )
