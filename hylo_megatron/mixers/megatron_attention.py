"""Causal softmax attention over torch's SDPA, with key and value widths that may differ and no attention mask.

Legend: S sequence, B batch, H query heads, G key heads, K key dim, V value dim.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hylo_megatron.mixers.megatron_layers import Rotary
from hylo_megatron.parallel.latent_ring import latent_attention


class CoreAttention(MegatronModule):
    """Core attention for layer specs, ``q_SBHK, k_SBGK, v_SBGV -> [S, B, H*V]``; H / G heads share a key head.

    ``rotary`` turns queries and keys first, where the caller has not done so. Under context parallelism keys and
    values travel as MLA's latents do (``latent_ring.py``): a mask would keep torch from its fused kernels.
    """

    def __init__(self, config, layer_number, attn_mask_type=None, attention_type="self", softmax_scale=None,
                 pg_collection=None, rotary: Rotary | None = None, cp_comm_type: str | None = None, **_):  # fmt: skip
        super().__init__(config)
        self.rotary, self.ring = rotary, cp_comm_type == "p2p"
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(self, q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor, attention_mask=None, **_) -> Tensor:
        cp_size = self.cp_group.size()
        if self.rotary:
            q_SBHK, k_SBGK = (self.rotary(x, cp_size, self.cp_group.rank()) for x in (q_SBHK, k_SBGK))
        attend = self._attend if cp_size == 1 else self._attend_across_ranks
        return attend(q_SBHK, k_SBGK, v_SBGV).permute(2, 0, 1, 3).flatten(2)

    def _attend(self, q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor) -> Tensor:
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHK, k_SBGK, v_SBGV))
        value_dim, key_dim = v.shape[-1], q.shape[-1]
        if q.is_cuda and value_dim < key_dim:  # flash kernels want one width
            v = F.pad(v, (0, key_dim - value_dim))
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=self.softmax_scale, enable_gqa=q.shape[1] != k.shape[1]
        )[..., :value_dim]

    def _attend_across_ranks(self, q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor) -> Tensor:
        (heads, key_dim), groups = q_SBHK.shape[2:], k_SBGK.shape[2]
        widths = [key_dim, v_SBGV.shape[-1]]

        def expand(held_LBR: Tensor, rank: int) -> tuple[Tensor, Tensor]:
            shared = held_LBR.unflatten(-1, (groups, -1)).repeat_interleave(heads // groups, 2)
            return shared.permute(1, 2, 0, 3).split(widths, -1)

        both_SBR = torch.cat([k_SBGK, v_SBGV], -1).flatten(2)
        scale = self.softmax_scale or key_dim**-0.5
        return latent_attention(q_SBHK.permute(1, 2, 0, 3), both_SBR, expand, [], self.cp_group, scale, self.ring)
