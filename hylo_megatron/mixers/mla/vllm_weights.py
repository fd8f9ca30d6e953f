"""Exported tensors of MLA as vLLM's parameters. No vLLM in here.

The padding functions take ``[rows, columns]`` with heads in rows.
"""

import torch
from torch import Tensor

from hylo_megatron.mixers.vllm_weights import Rule, Sizes, pad, spread


def query(rows: Tensor, sizes: Sizes) -> Tensor:
    """Pad the nope and the rotary part of every head."""
    t, s = sizes.trained, sizes.served
    rows = rows.unflatten(0, (-1, t.qk_nope_head_dim + t.qk_rope_head_dim))
    nope, rope = rows.split([t.qk_nope_head_dim, t.qk_rope_head_dim], 1)
    return torch.cat([pad(nope, 1, s.qk_nope_head_dim), spread(rope, 1, s.qk_rope_head_dim)], 1).flatten(0, 1)


def latent(rows: Tensor, sizes: Sizes) -> Tensor:
    """Pad the latent and the shared rotary key."""
    t, s = sizes.trained, sizes.served
    compressed, rope = rows.split([t.kv_lora_rank, t.qk_rope_head_dim])
    return torch.cat([pad(compressed, 0, s.kv_lora_rank), spread(rope, 0, s.qk_rope_head_dim)])


def key_value(rows: Tensor, sizes: Sizes) -> Tensor:
    """Pad the key and the value of every head, and the latent that they are made from."""
    t, s = sizes.trained, sizes.served
    rows = rows.unflatten(0, (sizes.heads, t.qk_nope_head_dim + t.v_head_dim))
    nope, value = rows.split([t.qk_nope_head_dim, t.v_head_dim], 1)
    rows = torch.cat([pad(nope, 1, s.qk_nope_head_dim), pad(value, 1, s.v_head_dim)], 1).flatten(0, 1)
    return pad(rows, 1, s.kv_lora_rank)


RULES = {
    "self_attn.q_proj.weight": Rule(pad=query),
    "self_attn.q_a_proj.weight": Rule(),
    "self_attn.q_b_proj.weight": Rule(pad=query),
    "self_attn.kv_a_proj_with_mqa.weight": Rule(pad=latent),
    "self_attn.kv_b_proj.weight": Rule(pad=key_value),
    "self_attn.o_proj.weight": Rule(),
    "self_attn.q_norm.weight": Rule(),
    "self_attn.k_norm.weight": Rule(),
}
