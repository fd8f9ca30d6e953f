"""Mamba-2 (arXiv 2405.21060) as megatron-core's ``MambaMixer`` computes it.

Rows of ``in_proj`` are [z, x, B, C, dt].
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedConfig
from transformers import initialization as init

from hylo_megatron import kernels
from hylo_megatron.mixers.hf_layers import HyLoConv1d, held
from hylo_megatron.mixers.hf_linear import LinearMixer, States, fp32_parameter, linear
from hylo_megatron.mixers.mamba2 import MIXER
from hylo_megatron.mixers.mamba2.geometry import NORM_EPS


class HyLoMamba2(LinearMixer):
    """``in_proj`` makes all that the scan reads; ``D`` adds the scan's input to its output."""

    fp32_names = MIXER.fp32

    def __init__(self, config: PreTrainedConfig, layer: int):
        super().__init__()
        mamba2 = config.geometry().mamba2
        self.layer = layer
        self.heads, self.groups = mamba2.num_heads, mamba2.num_groups
        inner, bc = self.heads * mamba2.head_dim, self.groups * mamba2.state_size
        self.sizes, self.conv_sizes = [inner, inner + 2 * bc, self.heads], [inner, bc, bc]
        self.in_proj = linear(config.hidden_size, sum(self.sizes))
        self.conv1d = HyLoConv1d(inner + 2 * bc, mamba2.conv_kernel, True)
        self.A_log, self.D, self.dt_bias = (fp32_parameter(self.heads) for _ in range(3))
        self.norm = kernels.RMSNormGated(inner, NORM_EPS, inner // self.groups, norm_before_gate=False)
        self.out_proj = linear(inner, config.hidden_size)

    def initial_values(self) -> None:
        super().initial_values()
        dt = torch.empty(self.dt_bias.shape).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        init.ones_(self.D)

    def mix(self, x_BSD: Tensor, real_BS1: Tensor | None, states: States) -> Tensor:
        z, xbc, dt = self.in_proj(x_BSD).split(self.sizes, -1)
        x, B, C = states.convolve(xbc, *held(self.conv1d)).split(self.conv_sizes, -1)
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if real_BS1 is not None:
            dt = dt * real_BS1  # the convolution's bias would write at padding otherwise
        x, B, C = (t.unflatten(-1, (n, -1)) for t, n in ((x, self.heads), (B, self.groups), (C, self.groups)))
        A = -self.A_log.float().exp()
        y = states.scan(states.ops.chunk_ssd, states.ops.step_ssd, x, dt, A, B, C, D=self.D.float())
        return self.out_proj(self.norm(y.flatten(-2), z))


LAYER = HyLoMamba2
