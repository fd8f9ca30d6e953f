"""The window beside a linear block for megatron-core: softmax attention over the last tokens and the first ones.

Tensor parallelism splits heads, as in the base model's attention. Every rank needs complete sequences
(``config/layout.py`` refuses context parallelism). Legend: S sequence, B batch, D model, H query heads and G key heads
of this rank, K head dim.
"""

from collections.abc import Callable
from functools import partial

import torch
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.kernels import ops_for
from hylo_megatron.kernels.window import far_positions, sequence_attention, sequence_mask
from hylo_megatron.mixers.megatron_layers import Backend, HeadRMSNorm, Rotary


def window_of(arch: Architecture, backend: Backend) -> Callable | None:
    """Return what makes a layer's window, or None. All layers share the tables."""
    if not arch.window:
        return None
    return partial(WindowAttention, arch=arch, backend=backend, tables=Tables(arch))


class Tables:
    """Rotations of queries and keys, and masks, of complete sequences: one of each for every shape."""

    def __init__(self, arch: Architecture):
        self.window, self.rotary, self.masks, self.far = arch.window, Rotary(arch, arch.head_dim), {}, {}

    def mask(self, q_SBHK: Tensor, groups: int) -> Tensor:
        key = (len(q_SBHK), q_SBHK.shape[2], groups, q_SBHK.dtype, q_SBHK.device)
        if key not in self.masks:
            self.masks[key] = sequence_mask(q_SBHK.transpose(0, 1), groups, self.window)
        return self.masks[key]

    def rotate(self, x_SBHK: Tensor) -> Tensor:
        return self.rotary(x_SBHK, 1, 0)

    def rotate_far(self, q_SBHK: Tensor) -> Tensor:
        """Rotate queries by the positions at which they meet the sinks."""
        key = len(q_SBHK), q_SBHK.device
        if key not in self.far:
            index = far_positions(torch.arange(key[0], device=key[1]), self.window)
            self.far[key] = tuple(part[index] for part in self.rotary.table(key[0], 1, 0, key[1]))
        return ops_for(q_SBHK).rotate(q_SBHK, *self.far[key])


class WindowAttention(SelfAttention):
    """``hidden_SBD -> out_SBD``: the base model's attention within the window.

    Each head is multiplied by twice the sigmoid of ``gate_proj``.
    """

    def __init__(self, config, *, arch: Architecture, backend: Backend, tables: Tables, layer_number: int,
                 pg_collection):  # fmt: skip
        head_norm = HeadRMSNorm if arch.qk_norm else None
        submodules = SelfAttentionSubmodules(
            linear_qkv=backend.column_linear, linear_proj=backend.row_linear, core_attention=IdentityOp,
            q_layernorm=head_norm, k_layernorm=head_norm,
        )  # fmt: skip
        super().__init__(config, submodules, layer_number, AttnMaskType.causal, pg_collection=pg_collection)
        gate = partial(backend.column, config=config, tp_group=pg_collection.tp, kind=backend.projection)
        self.gate_proj = gate(config.hidden_size, config.num_attention_heads)
        self.tables = tables

    def forward(self, hidden_states: Tensor) -> Tensor:
        q_SBHK, k_SBGK, v_SBGK = self.get_query_key_value_tensors(hidden_states)
        rotate, rotate_far = self.tables.rotate, self.tables.rotate_far
        parts = (rotate(q_SBHK), rotate_far(q_SBHK), rotate(k_SBGK), v_SBGK)
        mask = self.tables.mask(q_SBHK, k_SBGK.shape[2])
        out_BSHK = sequence_attention(*(part.transpose(0, 1) for part in parts), self.tables.window, mask)
        gate_SBH = self.gate_proj(hidden_states)[0][..., : out_BSHK.shape[2]]  # zeros behind it align its rows
        gate_SBH = 2 * gate_SBH.float().sigmoid().to(out_BSHK.dtype)
        return self.linear_proj((out_BSHK.transpose(0, 1) * gate_SBH.unsqueeze(-1)).flatten(2))[0]
