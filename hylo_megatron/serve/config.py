"""Settings of vLLM for a hybrid, and the geometry that it runs."""

import os

from vllm.logger import init_logger
from vllm.model_executor.models.config import VerifyAndUpdateConfig
from vllm.platforms import current_platform
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase
from vllm.utils.torch_utils import get_dtype_size, get_kv_cache_torch_dtype

from hylo_megatron.config.positions import has_window
from hylo_megatron.errors import HyLoError
from hylo_megatron.hf.config_values import described
from hylo_megatron.hf.configuration_hylo import HyLoConfig
from hylo_megatron.mixers import CACHED, MIXERS
from hylo_megatron.mixers.dimensions import geometry_to_config
from hylo_megatron.mixers.serving import stages
from hylo_megatron.mixers.window import cached_values, holders
from hylo_megatron.planner.pages import expanded_bytes, pages
from hylo_megatron.serve.geometry import Served, serve
from hylo_megatron.serve.refused import refused_settings

logger = init_logger("vllm.hylo_megatron")  # below vllm's own logger, so that its level and format apply
# Set by tests that run a GPU's geometry on a CPU.
GEOMETRY_OF = "HYLO_SERVE_GEOMETRY"
WORKSPACE = 4 << 30  # bytes
# Methods of --quantization that need no quantised folder. vLLM's int8 ones leave linear layers as they are.
ONLINE_FP8 = ("fp8", "fp8_per_tensor", "fp8_per_block", "fp8_per_channel")
CPU_CACHES = ("auto", "bfloat16", "float16", "float32")
MAMBA_CHUNK = 256  # vLLM's default for a config without the field is Mamba-1's


def on_gpu() -> bool:
    """Return whether the geometry is to fit the kernels of a GPU."""
    return os.environ.get(GEOMETRY_OF, "cpu" if current_platform.is_cpu() else "gpu") == "gpu"


def apply(config: HyLoConfig) -> None:
    """Write the served geometry into the fields of the trained one, which moves to ``config.trained_geometry``.

    vLLM reads sizes from many places. A config that was changed already stays as it is: vLLM copies configs and sends
    them to other processes.
    """
    if getattr(config, "trained_geometry", None):
        return
    trained = config.geometry()
    found = serve(trained, set(config.mixers), config.num_attention_heads, config.qk_norm, on_gpu())
    for note in found.notes:
        logger.info_once("HyLo: %s.", note)
    config.trained_geometry, config.expanded_head_size = trained.to_dict(), found.expanded
    if not current_platform.is_cpu() and not getattr(config, "head_dtype", None):
        config.head_dtype = "float32"  # logits as the product sums them up: rounded to bf16, the best ones often tie
    config.mamba_chunk_size = MAMBA_CHUNK
    for entry in described(config.mixers):
        for field, value in geometry_to_config(entry, entry.dimensions(found.geometry)).items():
            setattr(config, field, value)


def _keeps_latents(config: HyLoConfig) -> bool:
    return any(name in CACHED for name in config.mixers) and not config.expanded_head_size


class HyLoArchConvertor(ModelArchConfigConvertorBase):
    """Tells vLLM whether a hybrid caches latents, which it assumes for known model types only, and the head sizes."""

    def __init__(self, hf_config, hf_text_config, *args, **kwargs):
        super().__init__(hf_config, hf_text_config, *args, **kwargs)
        apply(hf_text_config)

    def is_deepseek_mla(self) -> bool:
        return _keeps_latents(self.hf_text_config)

    def _get_qk_rope_head_dim(self) -> int:
        return self.hf_text_config.qk_rope_head_dim

    def get_head_size(self) -> int:
        return self.hf_text_config.expanded_head_size or super().get_head_size()

    def get_total_num_kv_heads(self) -> int:
        return self.hf_text_config.num_attention_heads


class EngineSettings(VerifyAndUpdateConfig):
    """Settings of vLLM that a hybrid needs."""

    @staticmethod
    def verify_and_update_config(vllm_config) -> None:
        """Keep states in fp32, as in training, unless the user chose a type; let each mixer change what it needs."""
        refuse(vllm_config)
        cache = vllm_config.cache_config
        if cache.mamba_ssm_cache_dtype == "auto":
            cache.mamba_ssm_cache_dtype = "float32"
        if current_platform.is_cpu():  # vLLM switches it off for latents on a CPU, but too late for its block sizes
            cache.enable_prefix_caching = False
        # Matrix products padded to aligned widths have padded rows, which the next compiled piece does not expect:
        # Mamba-2's projection gave wrong tokens where a rank's heads were no multiple of 8.
        vllm_config.compilation_config.inductor_compile_config.setdefault("shape_padding", False)
        config = vllm_config.model_config.hf_config
        if on_gpu() and _keeps_latents(config):
            limit_requests(vllm_config)
        for name in dict.fromkeys(config.mixers):
            MIXERS[name].part("serving").settings(vllm_config, on_gpu=on_gpu())


def refuse(vllm_config) -> None:
    """Raise ``HyLoError`` for options with which a hybrid would start, and then ignore them or give wrong tokens."""
    model, dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    hybrid = model.hf_config
    weights = ONLINE_FP8[-1:] if current_platform.is_cpu() else ONLINE_FP8
    draft, lora = vllm_config.speculative_config, vllm_config.lora_config
    quantised = getattr(hybrid, "quantization_config", None)
    parallel = vllm_config.parallel_config
    split = parallel.decode_context_parallel_size > 1, getattr(parallel, "prefill_context_parallel_size", 1) > 1
    sends = getattr(vllm_config.kv_transfer_config, "kv_connector", None) or ""
    fields = {"linear_rope": hybrid.linear_rope, "window": hybrid.window}
    settings = refused_settings(hybrid.mixers, **fields, on_gpu=on_gpu())
    refused = (
        ("--speculative-config", draft, "rejected drafts would stay in the recurrent states; leave it out"),
        ("--enable-lora", lora,
         "adapters are not applied; merge them into the weights (peft: merge_and_unload) and serve the result"),
        ("quantization_config in config.json", quantised,
         f"export the model unquantised, then choose --quantization {weights[0]}"),
        (f"--quantization {model.quantization}", model.quantization not in (None, *weights),
         f"expected {' or '.join(weights)}, with which vLLM quantises an exported folder while it loads"),
        ("--decode-context-parallel-size" if split[0] else "--prefill-context-parallel-size", any(split),
         "recurrent states cannot be split by position; use --tensor-parallel-size"),
        *((f"{field} in config.json", True, reason) for field, reason in settings),
        ("--pipeline-parallel-size", hybrid.window and _lonely_windows(vllm_config),
         "a stage has windows beside MLA and no linear layer whose states could keep them; choose stages that have one"
         " (VLLM_PP_LAYER_PARTITION), or use --tensor-parallel-size"),
        (f"--kv-transfer-config with {sends}", hybrid.window and sends and "Offload" not in sends,  # that takes pages
         "connectors send two states of a layer, without the keys and values of its window; leave it out"),
        (f"--kv-cache-dtype {dtype}", current_platform.is_cpu() and dtype not in CPU_CACHES,
         f"a CPU keeps {', '.join(CPU_CACHES)}; leave it out"),
    )  # fmt: skip
    for option, given, advice in refused:
        if given:
            raise HyLoError(f"{option}: not supported for a hybrid: {advice}")


def _lonely_windows(vllm_config) -> bool:
    """Return whether a pipeline stage has a window and no linear layer that could hold its keys and values."""
    config = vllm_config.model_config.hf_config
    held = holders(config.mixers, config.window, stages(vllm_config))
    return any(has_window(config.window, kind) and layer not in held for layer, kind in enumerate(config.mixers))


def limit_requests(vllm_config) -> None:
    """Let no more requests run at once than there is work space for.

    vLLM sets aside a page of expanded keys and values for each request that may run at once. A hybrid's pages are
    long, and with vLLM's default of 1,024 requests that space alone may not fit.
    """
    config, scheduler = vllm_config.model_config.hf_config, vllm_config.scheduler_config
    cache, dtype = vllm_config.cache_config, vllm_config.model_config.dtype
    tp = vllm_config.parallel_config.tensor_parallel_size

    def itemsize(name: str) -> int:
        return get_dtype_size(get_kv_cache_torch_dtype(name, dtype))

    states = cache.mamba_ssm_cache_dtype
    heads, runs = config.num_attention_heads, Served(config.geometry())
    block = pages(
        runs,
        tuple(config.mixers),
        heads,
        itemsize=itemsize(cache.mamba_cache_dtype),
        state_itemsize=itemsize(states),
        row_itemsize=itemsize(cache.cache_dtype),
        tp=tp,
        window=cached_values(config, tp, stages(vllm_config)),
    ).block
    each = block * expanded_bytes(runs, heads, dtype.itemsize, tp)
    fits = max(1, WORKSPACE // each)
    if scheduler.max_num_seqs > fits:
        wanted = scheduler.max_num_seqs
        text = "HyLo: at most %d requests run at once: %d would take %.0f GiB of work space"
        less = " (less with --mamba-ssm-cache-dtype bfloat16)" if itemsize(states) > 2 else ""
        logger.warning_once(f"{text}{less}.", fits, wanted, wanted * each / 2**30)
        scheduler.max_num_seqs = fits
