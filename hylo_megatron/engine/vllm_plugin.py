"""Names that vLLM has no public way to register, and a bug of one of its kernels."""

from importlib import import_module

from hylo_megatron.engine.patch import entries


def _of_the_plugin(name: str):
    """Return the replacement that puts a class of ``hylo_megatron.serve.config`` there."""
    return lambda original, run: getattr(import_module("hylo_megatron.serve.config"), name)


def sound_tilings(configs: list, run) -> list:
    """Return the tilings of Mamba-2's scan that Triton compiles right on Hopper; the others give rows of NaN.

    With whole warp groups and 64 rows or more the product runs as wgmma on registers, which the next iteration of a
    pipelined loop overwrites.
    """
    return [c for c in configs if c.num_stages == 1 or c.num_warps % 4 or c.kwargs["BLOCK_SIZE_M"] % 64]


def _tries_racy_tilings() -> bool:
    from vllm.model_executor.layers.mamba.ops import ssd_chunk_scan
    from vllm.platforms import current_platform

    return current_platform.is_device_capability(90) and not hasattr(ssd_chunk_scan, "_drop_racy_wgmma_configs")


PATCHES = entries(
    "vllm", "vllm",
    ("vllm.transformers_utils.model_arch_config_convertor:MODEL_ARCH_CONFIG_CONVERTORS[hylo]",
     _of_the_plugin("HyLoArchConvertor"), "missing", "a plugin has no public way to tell vLLM the sizes of latents"),
    ("vllm.model_executor.models.config:MODELS_CONFIG_MAP[HyLoForCausalLM]", _of_the_plugin("EngineSettings"),
     "missing", "a plugin has no public way to check and complete vLLM's settings"),
) + entries(
    "vllm model", "vllm",
    ("vllm.model_executor.layers.mamba.ops.ssd_chunk_scan:_chunk_scan_fwd_kernel.configs", sound_tilings, "list",
     "vLLM 0.26 tries tilings that Triton miscompiles on Hopper, and may find one of them fastest"),
    needed=_tries_racy_tilings,
)  # fmt: skip
