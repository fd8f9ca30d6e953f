"""The window beside a mixer for transformers: softmax attention over the last tokens and the first ones.

Legend: B batch, Q new positions, D model, H query heads, G key heads, K head dim, Y = 2 K, S sinks.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from hylo_megatron.kernels.window import PADDING, far_positions, window_attention, window_mask
from hylo_megatron.mixers.hf_layers import HyLoRMSNorm, Rotation, rotate


class Rows(NamedTuple):
    """Keys beside values with their positions, ``PADDING`` where there is no token."""

    values: Tensor
    at: Tensor


class HyLoWindow(nn.Module):
    """The base model's attention, whose heads are multiplied by twice the sigmoid of ``gate_proj``.

    Positions count the real tokens of a row, so that the first of them are the sinks, behind padding too.
    """

    def __init__(self, config: PreTrainedConfig, layer: int):
        super().__init__()
        self.layer, self.window, self.rotation = layer, config.window, Rotation(config)
        self.heads, self.groups, self.dim = config.num_attention_heads, config.num_key_value_heads, config.head_dim
        hidden, bias = config.hidden_size, config.attention_bias
        self.q_proj = nn.Linear(hidden, self.heads * self.dim, bias=bias)
        self.k_proj, self.v_proj = (nn.Linear(hidden, self.groups * self.dim, bias=bias) for _ in range(2))
        self.o_proj = nn.Linear(self.heads * self.dim, hidden, bias=False)
        self.gate_proj = nn.Linear(hidden, self.heads, bias=False)
        self.q_norm, self.k_norm = nn.Identity(), nn.Identity()
        if config.base_qk_norm:
            self.q_norm, self.k_norm = (HyLoRMSNorm(self.dim, config.rms_norm_eps) for _ in range(2))

    def forward(self, x_BQD: Tensor, real_BQ1: Tensor | None = None, cache: Cache | None = None) -> Tensor:
        q, k, v = (proj(x_BQD).unflatten(-1, (-1, self.dim)) for proj in (self.q_proj, self.k_proj, self.v_proj))
        past, sinks = self._held(x_BQD, {} if cache is None else cache[self.layer])
        at_BQ = self._positions(x_BQD, real_BQ1, past)
        angles = self.rotation.cos_and_sin(at_BQ, self.dim)
        new = Rows(torch.cat([rotate(self.k_norm(k), *angles), v], -1), at_BQ)
        rows, sinks = Rows(*(torch.cat(pair, 1) for pair in zip(past, new, strict=True))), self._with_new(sinks, new)
        if cache is not None:  # copied: a view would keep the whole sequence in memory
            last = slice(-self.window["size"], None)
            cache[self.layer].update(
                window=rows.values[:, last].flatten(2).clone(), window_at=rows.at[:, last].clone(),
                sinks=sinks.values.flatten(2), sinks_at=sinks.at,
            )  # fmt: skip
        q_BQHK = self.q_norm(q)
        far = self.rotation.cos_and_sin(far_positions(at_BQ, self.window), self.dim)
        shared = self.heads // self.groups
        mask = window_mask(rows.at, sinks.at, at_BQ.shape[1], self.window, shared=shared, dtype=q.dtype)
        out_BQHK = window_attention(
            rotate(q_BQHK, *angles), rotate(q_BQHK, *far), rows.values, sinks.values, mask, self.window
        )
        gate_BQH = 2 * self.gate_proj(x_BQD).float().sigmoid().to(x_BQD.dtype)
        return self.o_proj((out_BQHK * gate_BQH.unsqueeze(-1)).flatten(2))

    def _held(self, x_BQD: Tensor, held: dict[str, Tensor]) -> tuple[Rows, Rows]:
        """Return the last rows and the sinks before this call."""
        if held.get("window") is not None:
            return tuple(
                Rows(held[name].unflatten(-1, (self.groups, -1)), held[f"{name}_at"]) for name in ("window", "sinks")
            )
        shape = len(x_BQD), self.window["sinks"]
        empty = torch.full(shape, PADDING, device=x_BQD.device)
        sinks = x_BQD.new_zeros(*shape, self.groups, 2 * self.dim)
        return Rows(sinks[:, :0], empty[:, :0]), Rows(sinks, empty)

    def _positions(self, x_BQD: Tensor, real_BQ1: Tensor | None, past: Rows) -> Tensor:
        real = x_BQD.new_ones(x_BQD.shape[:2], dtype=torch.bool) if real_BQ1 is None else real_BQ1.squeeze(-1)
        last_B1 = F.pad(past.at, (1, 0), value=PADDING).amax(1, keepdim=True)
        return torch.where(real, real.cumsum(1) + last_B1, PADDING)

    def _with_new(self, sinks: Rows, new: Rows) -> Rows:
        places = torch.arange(self.window["sinks"], device=new.at.device)
        found_BQS = new.at[:, :, None] == places
        here_BS = found_BQS.any(1)
        index = found_BQS.long().argmax(1)[:, :, None, None].expand(-1, -1, *new.values.shape[2:])
        values = torch.where(here_BS[:, :, None, None], new.values.gather(1, index), sinks.values)
        return Rows(values, torch.where(here_BS, places, sinks.at))
