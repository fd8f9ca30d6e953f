"""Gated DeltaNet (arXiv 2412.06464) as megatron-core's ``GatedDeltaNet`` computes it."""

from torch import Tensor
from transformers import PreTrainedConfig

from hylo_megatron import kernels
from hylo_megatron.mixers.gdn import MIXER
from hylo_megatron.mixers.hf_layers import HyLoGateNorm
from hylo_megatron.mixers.hf_linear import DeltaRuleMixer, States, linear


class HyLoGatedDeltaNet(DeltaRuleMixer):
    """``a_proj`` makes the decay of a head, ``g_proj`` the output gate."""

    fp32_names = MIXER.fp32

    def __init__(self, config: PreTrainedConfig, layer: int):
        gdn, hidden = config.geometry().gdn, config.hidden_size
        heads, keys = gdn.num_value_heads, gdn.num_key_heads * gdn.key_head_dim
        values = heads * gdn.value_head_dim
        super().__init__(
            layer, hidden, keys=keys, values=values, heads=heads, decays=heads, conv_kernel=gdn.conv_kernel
        )
        self.key_dim, self.value_dim = gdn.key_head_dim, gdn.value_head_dim
        self.a_proj, self.g_proj = linear(hidden, heads), linear(hidden, values)
        self.o_norm = HyLoGateNorm(self.value_dim, gdn.norm_eps or config.rms_norm_eps)

    def gate(self, x_BSD: Tensor) -> Tensor:
        return self.g_proj(x_BSD)

    def delta_rule(self, states: States, x_BSD: Tensor, real_BS1: Tensor | None, *qkv: Tensor, beta: Tensor) -> Tensor:
        g = kernels.log_decay(self.a_proj(x_BSD), self.A_log, self.dt_bias)
        g = g if real_BS1 is None else g * real_BS1
        ops = states.ops
        return states.scan(ops.chunk_gated_delta_rule, ops.step_gated_delta_rule, *qkv, g=g, beta=beta)


LAYER = HyLoGatedDeltaNet
