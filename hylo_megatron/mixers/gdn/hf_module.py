"""Gated DeltaNet (arXiv 2412.06464) as megatron-core's ``GatedDeltaNet`` computes it.

Legend: B batch, S sequence, D model, H value heads, C convolution channels.
"""

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers import initialization as init
from transformers.cache_utils import Cache

from hylo_megatron import kernels
from hylo_megatron.kernels.rope import Angles
from hylo_megatron.mixers.gdn import MIXER
from hylo_megatron.mixers.gdn.geometry import GDNGeometry
from hylo_megatron.mixers.hf_layers import HyLoConv1d, HyLoGateNorm, KeepsFp32, fp32_parameter, held


class HyLoGatedDeltaNet(KeepsFp32):
    """``a_proj`` makes the decay, ``b_proj`` beta, ``g_proj`` the output gate."""

    fp32_names = MIXER.fp32

    def __init__(self, config: PreTrainedConfig, layer: int):
        super().__init__()
        gdn: GDNGeometry = config.geometry().gdn
        self.layer, hidden = layer, config.hidden_size
        self.key_dim, self.value_dim = gdn.key_head_dim, gdn.value_head_dim
        heads, width = gdn.num_value_heads, gdn.conv_kernel
        keys, values = gdn.num_key_heads * self.key_dim, heads * self.value_dim
        self.q_proj = nn.Linear(hidden, keys, bias=False)
        self.k_proj = nn.Linear(hidden, keys, bias=False)
        self.v_proj = nn.Linear(hidden, values, bias=False)
        self.g_proj = nn.Linear(hidden, values, bias=False)
        self.a_proj = nn.Linear(hidden, heads, bias=False)
        self.b_proj = nn.Linear(hidden, heads, bias=False)
        self.q_conv1d = HyLoConv1d(keys, width, False)
        self.k_conv1d = HyLoConv1d(keys, width, False)
        self.v_conv1d = HyLoConv1d(values, width, False)
        self.A_log, self.dt_bias = fp32_parameter(heads), fp32_parameter(heads)
        self.o_norm = HyLoGateNorm(self.value_dim, gdn.norm_eps or config.rms_norm_eps)
        self.o_proj = nn.Linear(values, hidden, bias=False)
        self.conv_sizes = [keys, keys, values]

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
        q, k, v = qkv.split(self.conv_sizes, -1)
        # Not in the kernel: fla compiles its own norm anew for every size of batch, and prompts come in all sizes.
        q, k = (kernels.l2norm(t.unflatten(-1, (-1, self.key_dim))) for t in (q, k))
        g = kernels.log_decay(self.a_proj(x_BSD), self.A_log, self.dt_bias)
        if real_BS1 is not None:
            g = g * real_BS1
        decoding = "state" in past and x_BSD.shape[1] == 1
        rule = ops.step_gated_delta_rule if decoding else ops.chunk_gated_delta_rule
        out, state = rule(
            q,
            k,
            v.unflatten(-1, (-1, self.value_dim)),
            g=g,
            beta=self.b_proj(x_BSD).sigmoid(),
            initial_state=past.get("state"),
            output_final_state=cache is not None,
        )
        if cache is not None:
            cache.keep(self.layer, conv_state, state)
        gate = self.g_proj(x_BSD).unflatten(-1, (-1, self.value_dim))
        return self.o_proj(self.o_norm(out, gate).flatten(-2))


LAYER = HyLoGatedDeltaNet
