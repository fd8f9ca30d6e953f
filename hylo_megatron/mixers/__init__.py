"""Token mixers, a folder each, and the registry that everything else loops over.

A mixer's folder has the same few files, each imported only where its library is installed:

    __init__.py          ``MIXER``: the entry of the registry; no torch
    geometry.py          dimensions, presets and what refuses them; no torch
    mapping.py           weights: Hugging Face names and shapes, Megatron names
    initialise.py        the mixer from a base model's attention
    megatron_module.py   the layer for megatron-core, with tensor and context parallelism
    hf_module.py         the layer for transformers
    vllm_module.py       the layer for vLLM, its weights and its cache
    memory.py            bytes of training and of serving; no torch

What several mixers share stands beside the folders. To add a mixer: write its folder and name it in ``registry.py``.
"""

from hylo_megatron.mixers.mixer import BaseHeads, Mixer
from hylo_megatron.mixers.registry import LINEAR, MIXERS, mixer

__all__ = ["LINEAR", "MIXERS", "BaseHeads", "Mixer", "mixer"]
