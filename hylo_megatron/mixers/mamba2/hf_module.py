"""Mamba-2 (arXiv 2405.21060) as megatron-core's ``MambaMixer`` computes it.

Legend: B batch, S sequence, D model; rows of ``in_proj`` are [z, x, B, C, dt].
"""

import math

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache

from hylo_megatron import kernels
from hylo_megatron.kernels.rope import Angles
from hylo_megatron.mixers.hf_layers import HyLoConv1d, KeepsFp32, fp32_parameter, held
from hylo_megatron.mixers.mamba2 import MIXER
from hylo_megatron.mixers.mamba2.geometry import NORM_EPS, Mamba2Geometry


class HyLoMamba2(KeepsFp32):
    """``in_proj`` makes all that the scan reads; ``D`` adds the scan's input to its output."""

    fp32_names = MIXER.fp32

    def __init__(self, config: PreTrainedConfig, layer: int):
        super().__init__()
        mamba2: Mamba2Geometry = config.geometry().mamba2
        self.layer = layer
        self.heads, self.groups = mamba2.num_heads, mamba2.num_groups
        inner, bc = self.heads * mamba2.head_dim, self.groups * mamba2.state_size
        self.sizes = [inner, inner + 2 * bc, self.heads]
        self.conv_sizes = [inner, bc, bc]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.conv1d = HyLoConv1d(inner + 2 * bc, mamba2.conv_kernel, True)
        self.A_log, self.D = fp32_parameter(self.heads), fp32_parameter(self.heads)
        self.dt_bias = fp32_parameter(self.heads)
        self.norm = kernels.RMSNormGated(inner, NORM_EPS, inner // self.groups, norm_before_gate=False)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def initial_values(self) -> None:
        init.copy_(self.A_log, torch.empty(self.A_log.shape).uniform_(1, 16).log_())
        dt = torch.empty(self.dt_bias.shape).uniform_(math.log(1e-3), math.log(1e-1)).exp_()
        init.copy_(self.dt_bias, dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        init.ones_(self.D)

    def forward(
        self,
        x_BSD: torch.Tensor,
        angles: Angles | None = None,
        allowed: torch.Tensor | None = None,
        real_BS1: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """``real_BS1``: True at tokens that are no padding. ``angles`` and ``allowed`` are not read."""
        ops = kernels.ops_for(x_BSD)
        if real_BS1 is not None:
            x_BSD = x_BSD * real_BS1
        past = {} if cache is None else cache[self.layer]
        z, xbc, dt = self.in_proj(x_BSD).split(self.sizes, -1)
        xbc, conv_state = ops.causal_conv1d(
            xbc,
            *held(self.conv1d, HyLoConv1d),
            "silu",
            initial_state=past.get("conv"),
            output_final_state=cache is not None,
        )
        dt = F.softplus(dt.float() + self.dt_bias.float())
        if real_BS1 is not None:
            dt = dt * real_BS1  # the convolution's bias would write at padding otherwise
        x, B, C = xbc.split(self.conv_sizes, -1)
        scan = ops.step_ssd if "state" in past and x_BSD.shape[1] == 1 else ops.chunk_ssd
        y, state = scan(
            x.unflatten(-1, (self.heads, -1)),
            dt,
            -self.A_log.float().exp(),
            B.unflatten(-1, (self.groups, -1)),
            C.unflatten(-1, (self.groups, -1)),
            D=self.D.float(),
            initial_state=past.get("state"),
            output_final_state=cache is not None,
        )
        if cache is not None:
            cache.keep(self.layer, conv_state, state)
        return self.out_proj(self.norm(y.flatten(-2), z))


LAYER = HyLoMamba2
