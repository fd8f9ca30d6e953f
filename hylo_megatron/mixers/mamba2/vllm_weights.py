"""Exported tensors of Mamba-2 as vLLM's parameters. No vLLM in here."""

from hylo_megatron.mixers.vllm_weights import Rule

RULES = {
    "mixer.A_log": Rule("mixer.A"),
    "mixer.D": Rule(),
    "mixer.dt_bias": Rule(),
    "mixer.in_proj.weight": Rule(),
    "mixer.conv1d.weight": Rule(),
    "mixer.conv1d.bias": Rule(),
    "mixer.norm.weight": Rule(),
    "mixer.out_proj.weight": Rule(),
}
