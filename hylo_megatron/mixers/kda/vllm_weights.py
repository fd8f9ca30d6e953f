"""Exported tensors of Kimi Delta Attention as vLLM's parameters. No vLLM in here."""

from hylo_megatron.mixers.vllm_weights import Rule

_MERGED = "mixer.in_proj_qkvgfab.weight"

RULES = {
    "mixer.q_proj.weight": Rule(_MERGED, 0),
    "mixer.k_proj.weight": Rule(_MERGED, 1),
    "mixer.v_proj.weight": Rule(_MERGED, 2),
    "mixer.b_proj.weight": Rule(_MERGED, 3),
    "mixer.f_a_proj.weight": Rule(_MERGED, 4),
    "mixer.f_b_proj.weight": Rule(),
    "mixer.g_a_proj.weight": Rule(),
    "mixer.g_b_proj.weight": Rule(),
    "mixer.dt_bias": Rule(),
    "mixer.A_log": Rule(),
    "mixer.o_norm.weight": Rule(),
    "mixer.o_proj.weight": Rule(),
    "mixer.q_conv1d.weight": Rule("mixer.conv1d.weight", 0),
    "mixer.k_conv1d.weight": Rule("mixer.conv1d.weight", 1),
    "mixer.v_conv1d.weight": Rule("mixer.conv1d.weight", 2),
}
