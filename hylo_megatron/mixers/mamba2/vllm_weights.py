"""Exported tensors of Mamba-2 as vLLM's parameters. No vLLM in here."""

from hylo_megatron.mixers.vllm_weights import Rule, same

RULES = {
    "mixer.A_log": Rule("mixer.A"),
    **same("D", "dt_bias", "in_proj.weight", "conv1d.weight", "conv1d.bias", "norm.weight", "out_proj.weight"),
}
