"""Mamba-2 (arXiv 2405.21060) as megatron-core's ``MambaMixer`` computes it.

Legend: B batch, S sequence, D model; rows of ``in_proj`` are [z, x, B, C, dt].
"""

import torch
import torch.nn.functional as F
from torch import nn

from hylo_megatron import kernels
from hylo_megatron.hf.cache import HyLoCache
from hylo_megatron.hf.configuration_hylo import HyLoConfig
from hylo_megatron.hf.layers import HyLoConv1d, KeepsFp32, fp32_parameter, held

NORM_EPS = 1e-5  # MambaMixer's own, whatever the model's rms_norm_eps


class HyLoMamba2(KeepsFp32):
    fp32_names = ("A_log", "D", "dt_bias")

    def __init__(self, config: HyLoConfig, layer: int):
        super().__init__()
        self.layer, self.heads, self.head_dim = layer, config.mamba_num_heads, config.mamba_head_dim
        self.groups, inner = config.mamba_num_groups, config.mamba_num_heads * config.mamba_head_dim
        bc = self.groups * config.mamba_state_size
        self.sizes = [inner, inner + 2 * bc, self.heads]
        self.conv_sizes = [inner, bc, bc]
        self.in_proj = nn.Linear(config.hidden_size, sum(self.sizes), bias=False)
        self.conv1d = HyLoConv1d(inner + 2 * bc, config.mamba_conv_kernel, True)
        self.A_log, self.D = fp32_parameter(self.heads), fp32_parameter(self.heads)
        self.dt_bias = fp32_parameter(self.heads)
        self.norm = kernels.RMSNormGated(inner, NORM_EPS, inner // self.groups, norm_before_gate=False)
        self.out_proj = nn.Linear(inner, config.hidden_size, bias=False)

    def forward(
        self, x_BSD: torch.Tensor, real_BS1: torch.Tensor | None = None, cache: HyLoCache | None = None
    ) -> torch.Tensor:
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
