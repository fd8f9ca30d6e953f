"""The window beside a linear block for transformers: softmax attention over the last tokens and the first ones.

Legend: B batch, Q new positions, D model, H query heads, G key heads, K head dim, Y = 2 K, W window, S sinks.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from hylo_megatron.kernels.rope import Angles
from hylo_megatron.kernels.window import PADDING, window_attention, window_mask
from hylo_megatron.mixers.hf_layers import HyLoRMSNorm, rotate


class HyLoWindow(nn.Module):
    """The base model's attention, whose heads are multiplied by twice the sigmoid of ``gate_proj``.

    Positions count the real tokens of a row, so that the first of them are the sinks, behind padding too.
    """

    def __init__(self, config: PreTrainedConfig, layer: int):
        super().__init__()
        self.layer, self.size, self.sinks = layer, config.window["size"], config.window["sinks"]
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.dim, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(hidden, self.groups * self.dim, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(self.heads * self.dim, hidden, bias=False)
        self.gate_proj = nn.Linear(hidden, self.heads, bias=False)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.base_qk_norm:
            self.q_norm, self.k_norm = (HyLoRMSNorm(self.dim, config.rms_norm_eps) for _ in range(2))

    def forward(
        self, x_BQD: Tensor, angles: Angles, real_BQ1: Tensor | None = None, cache: Cache | None = None
    ) -> Tensor:
        q, k, v = (proj(x_BQD).unflatten(-1, (-1, self.dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        turn = angles.window_cos, angles.window_sin
        q_BQHK, k = rotate(self.q_norm(q), *turn), rotate(self.k_norm(k), *turn)
        past = self._past(torch.cat([k, v], -1), {} if cache is None else cache[self.layer])
        rows, at, sinks, sink_at = self._extended(torch.cat([k, v], -1), real_BQ1, *past)
        if cache is not None:  # copied: a view would keep the whole sequence in memory
            cache[self.layer].update(
                window=rows[:, -self.size :].flatten(2).clone(), window_at=at[:, -self.size :].clone(),
                sinks=sinks.flatten(2), sink_at=sink_at,
            )  # fmt: skip
        mask = window_mask(
            at, sink_at, q_BQHK.shape[1], window=self.size, sinks=self.sinks, shared=self.heads // self.groups,
            dtype=q_BQHK.dtype,
        )  # fmt: skip
        out_BQHK = window_attention(q_BQHK, rows, sinks, mask, self.size)
        gate_BQH = 2 * self.gate_proj(x_BQD).float().sigmoid().to(x_BQD.dtype)
        return self.o_proj((out_BQHK * gate_BQH.unsqueeze(-1)).flatten(2))

    def _past(self, rows_BQGY: Tensor, held: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """Return the rows and positions of the last tokens and of the sinks before this call."""
        if "window" in held:
            rows, sinks = (held[name].unflatten(-1, (self.groups, -1)) for name in ("window", "sinks"))
            return rows, held["window_at"], sinks, held["sink_at"]
        batch = len(rows_BQGY)
        empty = torch.full((batch, self.sinks), PADDING, device=rows_BQGY.device)
        return rows_BQGY[:, :0], empty[:, :0], rows_BQGY.new_zeros(batch, self.sinks, *rows_BQGY.shape[2:]), empty

    def _extended(self, rows_BQGY: Tensor, real_BQ1: Tensor | None, past, past_at, sinks, sink_at) -> tuple:
        """Return what ``_past`` does, with the new tokens."""
        real = torch.ones_like(rows_BQGY[..., 0, 0], dtype=torch.bool) if real_BQ1 is None else real_BQ1.squeeze(-1)
        last_B1 = F.pad(past_at, (1, 0), value=PADDING).amax(1, keepdim=True)
        at = torch.where(real, real.cumsum(1) + last_B1, PADDING)
        found = at[:, :, None] == torch.arange(self.sinks, device=at.device)
        here = found.any(1)
        index = found.long().argmax(1)[:, :, None, None].expand(-1, -1, *rows_BQGY.shape[2:])
        sinks = torch.where(here[:, :, None, None], rows_BQGY.gather(1, index), sinks)
        sink_at = torch.where(here, torch.arange(self.sinks, device=at.device), sink_at)
        return torch.cat([past, rows_BQGY], 1), torch.cat([past_at, at], 1), sinks, sink_at
