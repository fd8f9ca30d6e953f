"""Exported tensors of Kimi Delta Attention as vLLM's parameters. No vLLM in here."""

from hylo_megatron.mixers.vllm_weights import merged, same

RULES = {
    **merged("in_proj_qkvgfab", "q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj"),
    **merged("conv1d", "q_conv1d", "k_conv1d", "v_conv1d"),
    **same("f_b_proj.weight", "g_a_proj.weight", "g_b_proj.weight", "dt_bias", "A_log", "o_norm.weight"),
    **same("o_proj.weight"),
}
