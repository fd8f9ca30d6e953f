"""Kimi Delta Attention in vLLM, whose kernels take all sizes that fla's take. No torch or vLLM in here."""

from hylo_megatron.mixers.serving import as_trained, no_settings

served, settings = as_trained, no_settings
