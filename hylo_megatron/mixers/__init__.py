"""Token mixers, a folder each, and the registry that everything else loops over.

A mixer's folder has the same few files, each imported only where its library is installed:

    __init__.py          ``MIXER``: the entry of the registry; no torch
    geometry.py          dimensions, their names in ``config.json``, presets and what refuses them; no torch
    mapping.py           weights: Hugging Face names and shapes, Megatron names
    initialise.py        the mixer from a base model's attention
    megatron_module.py   the layer for megatron-core, with tensor and context parallelism
    hf_module.py         the layer for transformers
    serving.py           the dimensions that vLLM runs, and the settings of vLLM that fit them; no torch, no vLLM
    vllm_weights.py      exported tensors as vLLM's parameters; no vLLM
    vllm_module.py       the layer for vLLM and the shapes of its states
    memory.py            bytes of training and of serving; no torch
    flops.py             FLOPs of a token beside the products with weights; no torch
    sent.py              what the ranks that share a layer send each other; no torch

What several mixers share stands beside the folders under the same names, and in ``megatron_*.py``, ``hf_*.py``
and ``vllm_*.py``.

To add a mixer: write its folder and name it in ``registry.py``.
"""

from hylo_megatron.mixers.mixer import BaseHeads, Mixer
from hylo_megatron.mixers.registry import CACHED, FAST_SUFFIXES, FP32_SUFFIXES, LINEAR, MIXERS

__all__ = ["CACHED", "FAST_SUFFIXES", "FP32_SUFFIXES", "LINEAR", "MIXERS", "BaseHeads", "Mixer"]
