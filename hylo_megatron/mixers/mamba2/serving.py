"""Mamba-2 in vLLM, whose kernels take all sizes. No torch or vLLM in here."""

from hylo_megatron.mixers.serving import as_trained, no_settings

served, settings = as_trained, no_settings
