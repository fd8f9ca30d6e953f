"""Exported hybrids in vLLM: a plugin (entry point ``vllm.general_plugins``), so that ``vllm serve DIR`` works.

Start with model.py. geometry.py chooses the geometry that vLLM runs for a trained one, weights.py maps the tensors,
cpu.py holds what vLLM's CPU build lacks.
"""

ARCHITECTURE = "HyLoForCausalLM"


def register() -> None:
    """Make the hybrid known to vLLM, which calls this in each of its processes, any number of times."""
    from vllm import ModelRegistry

    from hylo_megatron.engine.register import install
    from hylo_megatron.hf import register_config, register_tokenizer

    register_config()
    register_tokenizer()
    install("vllm")
    if ARCHITECTURE not in ModelRegistry.get_supported_archs():
        ModelRegistry.register_model(ARCHITECTURE, "hylo_megatron.serve.model:HyLoForCausalLM")
