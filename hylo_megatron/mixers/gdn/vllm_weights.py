"""Exported tensors of Gated DeltaNet as vLLM's parameters. No vLLM in here."""

from torch import Tensor

from hylo_megatron.mixers.vllm_weights import Rule, Sizes, merged


def value_heads(x: Tensor, sizes: Sizes) -> Tensor:
    """Repeat the entry of each value head for every head that it was split into."""
    return x.repeat_interleave(sizes.served.num_value_heads // sizes.trained.num_value_heads, 0)


RULES = {
    **merged("in_proj_qkvz", "q_proj", "k_proj", "v_proj", "g_proj"),
    **merged("in_proj_ba", "b_proj", "a_proj", pad=value_heads),
    **merged("conv1d", "q_conv1d", "k_conv1d", "v_conv1d"),
    "mixer.dt_bias": Rule(pad=value_heads),
    "mixer.A_log": Rule(pad=value_heads),
    "mixer.o_norm.weight": Rule("mixer.norm.weight"),
    "mixer.o_proj.weight": Rule("mixer.out_proj.weight"),
}
