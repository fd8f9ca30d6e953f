"""Kimi Delta Attention (arXiv 2510.26692), with the parameters of transformers' Kimi Linear."""

from torch import Tensor
from transformers import PreTrainedConfig

from hylo_megatron.mixers.hf_layers import HyLoGateNorm
from hylo_megatron.mixers.hf_linear import DeltaRuleMixer, States, linear
from hylo_megatron.mixers.kda import MIXER

NO_DECAY = -1e4  # softplus of it is 0


class HyLoKimiDeltaAttention(DeltaRuleMixer):
    """``f_a_proj`` and ``f_b_proj`` make decays of key channels, ``g_a_proj`` and ``g_b_proj`` the output gate."""

    fp32_names = MIXER.fp32

    def __init__(self, config: PreTrainedConfig, layer: int):
        kda, hidden = config.geometry().kda, config.hidden_size
        width = kda.num_heads * kda.head_dim
        super().__init__(
            layer, hidden, keys=width, values=width, heads=kda.num_heads, decays=width, conv_kernel=kda.conv_kernel
        )
        self.key_dim = self.value_dim = kda.head_dim
        self.f_a_proj, self.f_b_proj = linear(hidden, kda.head_dim), linear(kda.head_dim, width)
        self.g_a_proj, self.g_b_proj = linear(hidden, kda.head_dim), linear(kda.head_dim, width)
        self.o_norm = HyLoGateNorm(kda.head_dim, kda.norm_eps or config.rms_norm_eps, "sigmoid")

    def gate(self, x_BSD: Tensor) -> Tensor:
        return self.g_b_proj(self.g_a_proj(x_BSD))

    def delta_rule(self, states: States, x_BSD: Tensor, real_BS1: Tensor | None, *qkv: Tensor, beta: Tensor) -> Tensor:
        raw = self.f_b_proj(self.f_a_proj(x_BSD))
        raw = raw if real_BS1 is None else raw.masked_fill(~real_BS1, NO_DECAY)
        decay = dict(g=raw.unflatten(-1, (-1, self.key_dim)), A_log=self.A_log, dt_bias=self.dt_bias)
        return states.scan(states.ops.chunk_kda, states.ops.step_kda, *qkv, beta=beta, **decay)


LAYER = HyLoKimiDeltaAttention
