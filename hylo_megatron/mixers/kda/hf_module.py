"""Kimi Delta Attention (arXiv 2510.26692), with the parameters of transformers' Kimi Linear.

Legend: B batch, S sequence, D model, H heads, K head dim, C convolution channels.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache

from hylo_megatron import kernels
from hylo_megatron.kernels.rope import Angles
from hylo_megatron.mixers.hf_layers import HyLoConv1d, HyLoGateNorm, KeepsFp32, fp32_parameter, held
from hylo_megatron.mixers.kda import MIXER
from hylo_megatron.mixers.kda.geometry import KDAGeometry

NO_DECAY = -1e4  # softplus of it is 0


class HyLoSigmoidGateNorm(HyLoGateNorm):
    """RMSNorm of ``x``, times the sigmoid of ``gate``."""

    def forward(self, x: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
        return kernels.ops_for(x).gated_rms_norm(x, gate, self.weight, self.eps, activation="sigmoid")


class HyLoKimiDeltaAttention(KeepsFp32):
    """``f_a_proj`` and ``f_b_proj`` make the decay, ``b_proj`` beta, ``g_a_proj`` and ``g_b_proj`` the output gate."""

    fp32_names = MIXER.fp32

    def __init__(self, config: PreTrainedConfig, layer: int):
        super().__init__()
        kda: KDAGeometry = config.geometry().kda
        self.layer, hidden, self.head_dim = layer, config.hidden_size, kda.head_dim
        width = kda.num_heads * kda.head_dim
        self.q_proj = nn.Linear(hidden, width, bias=False)
        self.k_proj = nn.Linear(hidden, width, bias=False)
        self.v_proj = nn.Linear(hidden, width, bias=False)
        self.b_proj = nn.Linear(hidden, kda.num_heads, bias=False)
        self.f_a_proj = nn.Linear(hidden, kda.head_dim, bias=False)
        self.f_b_proj = nn.Linear(kda.head_dim, width, bias=False)
        self.g_a_proj = nn.Linear(hidden, kda.head_dim, bias=False)
        self.g_b_proj = nn.Linear(kda.head_dim, width, bias=False)
        self.q_conv1d = HyLoConv1d(width, kda.conv_kernel, False)
        self.k_conv1d = HyLoConv1d(width, kda.conv_kernel, False)
        self.v_conv1d = HyLoConv1d(width, kda.conv_kernel, False)
        self.A_log, self.dt_bias = fp32_parameter(kda.num_heads), fp32_parameter(width)
        self.o_norm = HyLoSigmoidGateNorm(kda.head_dim, kda.norm_eps or config.rms_norm_eps)
        self.o_proj = nn.Linear(width, hidden, bias=False)

    def initial_values(self) -> None:
        init.copy_(self.A_log, torch.empty(self.A_log.shape).uniform_(1, 16).log_())
        init.ones_(self.dt_bias)

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
        projected = torch.cat([self.q_proj(x_BSD), self.k_proj(x_BSD), self.v_proj(x_BSD)], -1)
        weight = torch.cat([held(conv, HyLoConv1d)[0] for conv in (self.q_conv1d, self.k_conv1d, self.v_conv1d)])
        qkv, conv_state = ops.causal_conv1d(
            projected, weight, None, "silu", initial_state=past.get("conv"), output_final_state=cache is not None
        )
        decay = self.f_b_proj(self.f_a_proj(x_BSD))
        if real_BS1 is not None:
            decay = decay.masked_fill(~real_BS1, NO_DECAY)
        heads = (*qkv.chunk(3, -1), decay, self.g_b_proj(self.g_a_proj(x_BSD)))
        q, k, v, decay, gate = (x.unflatten(-1, (-1, self.head_dim)) for x in heads)
        decoding = "state" in past and x_BSD.shape[1] == 1
        out, state = (ops.step_kda if decoding else ops.chunk_kda)(
            kernels.l2norm(q),  # not in the kernel: fla compiles its own norm anew for every size of batch
            kernels.l2norm(k),
            v,
            g=decay,
            beta=self.b_proj(x_BSD).sigmoid(),
            A_log=self.A_log,
            dt_bias=self.dt_bias,
            initial_state=past.get("state"),
            output_final_state=cache is not None,
        )
        if cache is not None:
            cache.keep(self.layer, conv_state, state)
        return self.o_proj(self.o_norm(out, gate).flatten(-2))


LAYER = HyLoKimiDeltaAttention
