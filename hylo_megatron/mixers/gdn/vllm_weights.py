"""Exported tensors of Gated DeltaNet as vLLM's parameters. No vLLM in here."""

from torch import Tensor

from hylo_megatron.mixers.vllm_weights import Rule, Sizes


def value_heads(x: Tensor, sizes: Sizes) -> Tensor:
    """Repeat the entry of each value head for every head that it was split into."""
    return x.repeat_interleave(sizes.served.num_value_heads // sizes.trained.num_value_heads, 0)


RULES = {
    "mixer.q_proj.weight": Rule("mixer.in_proj_qkvz.weight", 0),
    "mixer.k_proj.weight": Rule("mixer.in_proj_qkvz.weight", 1),
    "mixer.v_proj.weight": Rule("mixer.in_proj_qkvz.weight", 2),
    "mixer.g_proj.weight": Rule("mixer.in_proj_qkvz.weight", 3),
    "mixer.b_proj.weight": Rule("mixer.in_proj_ba.weight", 0, value_heads),
    "mixer.a_proj.weight": Rule("mixer.in_proj_ba.weight", 1, value_heads),
    "mixer.dt_bias": Rule(pad=value_heads),
    "mixer.A_log": Rule(pad=value_heads),
    "mixer.o_norm.weight": Rule("mixer.norm.weight"),
    "mixer.o_proj.weight": Rule("mixer.out_proj.weight"),
    "mixer.q_conv1d.weight": Rule("mixer.conv1d.weight", 0),
    "mixer.k_conv1d.weight": Rule("mixer.conv1d.weight", 1),
    "mixer.v_conv1d.weight": Rule("mixer.conv1d.weight", 2),
}
