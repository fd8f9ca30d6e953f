"""Causal softmax attention over torch's SDPA, with key and value widths that may differ and no attention mask.

Legend: S sequence, B batch, H query heads, G key heads, K key dim, V value dim.
"""

import torch
import torch.nn.functional as F
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hylo_megatron.config.layout import check_exchange
from hylo_megatron.errors import HyLoError
from hylo_megatron.mixers.megatron_layers import Rotary
from hylo_megatron.parallel.attention import Shared, attention_across_ranks


def refuse_packed(packed_seq_params) -> None:
    """Refuse sequences that megatron-core has packed into one row: our softmax attention would see across them."""
    if packed_seq_params is not None:
        raise HyLoError(
            "packed_seq_params: softmax attention here has no borders inside a row; pass each sequence as a row"
        )


class CoreAttention(MegatronModule):
    """Core attention for layer specs, ``q_SBHK, k_SBGK, v_SBGV -> [S, B, H*V]``; H / G heads share a key head.

    ``rotary`` turns queries and keys first, where the caller has not done so. Under context parallelism the ranks
    exchange keys and values as they exchange MLA's latents (``parallel/attention.py``).
    """

    def __init__(self, config, layer_number, attn_mask_type=None, attention_type="self", softmax_scale=None,
                 pg_collection=None, rotary: Rotary | None = None, cp_comm_type: str | None = None, **_):  # fmt: skip
        super().__init__(config)
        check_exchange(cp_comm_type)
        self.rotary, self.mode = rotary, cp_comm_type
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(
        self, q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor, attention_mask=None, packed_seq_params=None, **_
    ) -> Tensor:
        refuse_packed(packed_seq_params)
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
        groups, widths = k_SBGK.shape[2], [k_SBGK.shape[-1], v_SBGV.shape[-1]]

        def expand(held_LBR: Tensor, rank: int, keys: slice) -> tuple[Tensor, Tensor]:
            return held_LBR.unflatten(-1, (groups, -1)).permute(1, 2, 0, 3).split(widths, -1)

        shared = Shared(
            group=self.cp_group, scale=self.softmax_scale or widths[0] ** -0.5, expand=expand,
            values=groups * sum(widths), mode=self.mode,
        )  # fmt: skip
        both_SBR = torch.cat([k_SBGK, v_SBGV], -1).flatten(2)
        return attention_across_ranks(q_SBHK.permute(1, 2, 0, 3), both_SBR, shared)
