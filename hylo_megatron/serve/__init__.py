"""Exported hybrids in vLLM: a plugin (entry point ``vllm.general_plugins``), so that ``vllm serve DIR`` works.

Start with model.py. geometry.py says which geometry the engine runs for a trained one, weights.py maps the tensors,
cpu.py holds what vLLM's CPU build lacks.
"""

ARCHITECTURE = "HyLoForCausalLM"


def register() -> None:
    """Called by vLLM in each of its processes, any number of times; imports no torch module of ours."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP
    from vllm.transformers_utils.model_arch_config_convertor import MODEL_ARCH_CONFIG_CONVERTORS

    from hylo_megatron.hf import register_config
    from hylo_megatron.serve.config import EngineSettings, HyLoArchConvertor

    register_config()
    MODEL_ARCH_CONFIG_CONVERTORS["hylo"] = HyLoArchConvertor
    MODELS_CONFIG_MAP[ARCHITECTURE] = EngineSettings
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "hylo_megatron.serve.model:HyLoForCausalLM")
