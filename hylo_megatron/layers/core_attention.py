"""Causal softmax attention over torch's SDPA: key and value widths may differ, context parallelism by all-gather."""

import functools

import torch
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from hylo_megatron.layers.rope import Rotary
from hylo_megatron.layers.zigzag import zigzag_positions


@functools.lru_cache(maxsize=4)
def _causal_mask(local_length: int, cp_size: int, cp_rank: int) -> Tensor:
    """Boolean ``[S_local, S]``, keys in the order that an all-gather over ranks brings."""
    keys = torch.cat([zigzag_positions(local_length, cp_size, rank) for rank in range(cp_size)])
    return zigzag_positions(local_length, cp_size, cp_rank)[:, None] >= keys


class CoreAttention(MegatronModule):
    """Spec-compatible core attention; ``q_SBHK, k_SBGK, v_SBGV -> [S, B, H*V]`` key heads shared by H / G.

    ``rotary`` turns queries and keys first, where the caller has not done so.
    """

    def __init__(self, config, layer_number, attn_mask_type=None, attention_type="self", softmax_scale=None,
                 pg_collection=None, rotary: Rotary | None = None, **_):  # fmt: skip
        super().__init__(config)
        self.rotary = rotary
        self.softmax_scale = softmax_scale
        self.cp_group = pg_collection.cp

    def forward(self, q_SBHK: Tensor, k_SBGK: Tensor, v_SBGV: Tensor, attention_mask=None, **_) -> Tensor:
        cp_size, mask = self.cp_group.size(), None
        if self.rotary:
            q_SBHK, k_SBGK = (self.rotary(x, cp_size, self.cp_group.rank()) for x in (q_SBHK, k_SBGK))
        if cp_size > 1:
            k_SBGK = gather_from_sequence_parallel_region(k_SBGK, group=self.cp_group)
            v_SBGV = gather_from_sequence_parallel_region(v_SBGV, group=self.cp_group)
            mask = _causal_mask(q_SBHK.shape[0], cp_size, self.cp_group.rank()).to(q_SBHK.device)
        q, k, v = (x.permute(1, 2, 0, 3) for x in (q_SBHK, k_SBGK, v_SBGV))
        value_dim, key_dim = v.shape[-1], q.shape[-1]
        if q.is_cuda and value_dim < key_dim:  # flash kernels want one width
            v = F.pad(v, (0, key_dim - value_dim))
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.softmax_scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )[..., :value_dim]  # fmt: skip
        return out.permute(2, 0, 1, 3).flatten(2)
