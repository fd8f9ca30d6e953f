"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434) without latent norms.

Legend: B batch, S new positions, T all positions, H heads, N nope dims, P rope dims, V value dim, R latent rank.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedConfig
from transformers.cache_utils import Cache

from hylo_megatron.kernels.rope import Angles
from hylo_megatron.mixers.hf_layers import HyLoRMSNorm, is_plain_linear, rotate, scale_queries


class HyLoMLA(nn.Module):
    """One rope key is shared by all heads. Cached per token: the latent and the shared key, in the model's dtype.

    The shared key is cached rotated, but with ``qk_norm`` as it is: the norm of each head's key comes before the
    rotation. The output of ``window`` (``hf_window.py``) is added where the model has one beside MLA layers.
    """

    def __init__(self, config: PreTrainedConfig, layer: int):
        super().__init__()
        self.layer, self.heads = layer, config.num_attention_heads
        self.window: nn.Module | None = None
        self.nope, self.rope = config.qk_nope_head_dim, config.qk_rope_head_dim
        self.rank, self.value = config.kv_lora_rank, config.v_head_dim
        self.scale = (self.nope + self.rope) ** -0.5
        hidden, queries = config.hidden_size, self.heads * (self.nope + self.rope)
        if config.q_lora_rank:
            self.q_a_proj = nn.Linear(hidden, config.q_lora_rank, bias=False)
            self.q_b_proj = nn.Linear(config.q_lora_rank, queries, bias=False)
        else:
            self.q_proj = nn.Linear(hidden, queries, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(hidden, self.rank + self.rope, bias=False)
        self.kv_b_proj = nn.Linear(self.rank, self.heads * (self.nope + self.value), bias=False)
        self.o_proj = nn.Linear(self.heads * self.value, hidden, bias=False)
        self.qk_norm = config.qk_norm
        if self.qk_norm:
            self.q_norm, self.k_norm = (HyLoRMSNorm(self.nope + self.rope, config.rms_norm_eps) for _ in range(2))

    def forward(
        self,
        x_BSD: torch.Tensor,
        angles: Angles,
        allowed: torch.Tensor | None = None,
        real_BS1: torch.Tensor | None = None,
        cache: Cache | None = None,
    ) -> torch.Tensor:
        """``allowed`` [B,1,S,T] bool: which positions a query sees. None: all before it; S is T or 1.

        ``real_BS1`` is for the window only: ``allowed`` leaves padding out.
        """
        query = self.q_b_proj(self.q_a_proj(x_BSD)) if hasattr(self, "q_a_proj") else self.q_proj(x_BSD)
        query_BSHK = query.unflatten(-1, (self.heads, -1))
        if self.qk_norm:
            query_BSHK = self.q_norm(query_BSHK)
        q_nope, q_rope = scale_queries(query_BSHK, angles.scale).split([self.nope, self.rope], -1)
        q_rope = rotate(q_rope, angles.cos, angles.sin)
        rows = self._rows(x_BSD, angles)
        decoding = cache is not None and cache.length > 0 and x_BSD.shape[1] == 1
        if cache is not None:
            rows = cache.append(self.layer, rows)
        absorb = decoding and not self.qk_norm and is_plain_linear(self.kv_b_proj)
        if absorb:
            out_BSHV = self._absorbed(q_nope, q_rope, rows, allowed)
        else:
            out_BSHV = self._expanded(torch.cat([q_nope, q_rope], -1), rows, angles, allowed)
        out_BSD = self.o_proj(out_BSHV.flatten(-2))
        return out_BSD if self.window is None else out_BSD + self.window(x_BSD, real_BS1, cache)

    def _rows(self, x_BSD, angles) -> torch.Tensor:
        """Return what is cached, [B,S,R+P]."""
        rows = self.kv_a_proj_with_mqa(x_BSD)
        if self.qk_norm:
            return rows
        latent, key = rows.split([self.rank, self.rope], -1)
        return torch.cat([latent, rotate(key.unsqueeze(2), angles.cos, angles.sin).squeeze(2)], -1)

    def _expanded(self, query, rows_BTR, angles, allowed) -> torch.Tensor:
        """Attend with keys and values of every head, [B,S,H,V].

        For whole sequences, and where ``kv_b_proj`` has an adapter or quantised weights, so that only its own forward
        is right.
        """
        latent, k_rope = rows_BTR.split([self.rank, self.rope], -1)
        k_nope, value = self.kv_b_proj(latent).unflatten(-1, (self.heads, -1)).split([self.nope, self.value], -1)
        key = torch.cat([k_nope, k_rope.unsqueeze(2).expand(-1, -1, self.heads, -1)], -1)
        if self.qk_norm:
            k_nope, k_rope = self.k_norm(key).split([self.nope, self.rope], -1)
            at = (angles.cos, angles.sin) if angles.key_cos is None else (angles.key_cos, angles.key_sin)
            key = torch.cat([k_nope, rotate(k_rope, *at)], -1)
        if self.value < key.shape[-1]:  # flash kernels want one width; others make [S,T] scores
            value = F.pad(value, (0, key.shape[-1] - self.value))
        query, key, value = (t.transpose(1, 2) for t in (query, key, value))
        causal = allowed is None and query.shape[2] > 1  # a single last token sees everything
        out = F.scaled_dot_product_attention(query, key, value, allowed, is_causal=causal, scale=self.scale)
        return out[..., : self.value].transpose(1, 2)

    def _absorbed(self, q_nope, q_rope, rows_BTR, allowed) -> torch.Tensor:
        """Attend from one token in latent space: ``kv_b_proj`` is applied to the query and to the result."""
        up_k, up_v = self.kv_b_proj.weight.view(self.heads, -1, self.rank).split([self.nope, self.value], 1)
        q_latent = torch.einsum("bhn,hnr->bhr", q_nope[:, 0], up_k)
        query_BHR = torch.cat([q_latent, q_rope[:, 0]], -1)
        # All heads read the same rows: the heads take the place of the queries.
        mask = None if allowed is None else allowed[:, 0]
        latent = F.scaled_dot_product_attention(
            query_BHR, rows_BTR, rows_BTR[..., : self.rank], mask, scale=self.scale
        )
        return torch.einsum("bhr,hvr->bhv", latent, up_v).unsqueeze(1)


LAYER = HyLoMLA
