"""The window beside a mixer for megatron-core: softmax attention over the last tokens and the first ones.

Tensor parallelism splits heads, as in the base model's attention. Under context parallelism each chunk of a sequence
fetches the keys and values of the window before it, and those of the sinks (``parallel/halo.py``), whichever way the
mixer itself works. Legend: S tokens of this rank, B batch, D model, H query heads and G key heads of this rank,
K head dim.
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
from hylo_megatron.kernels.rope import cos_and_sin
from hylo_megatron.kernels.window import PADDING, far_positions, window_attention, window_mask
from hylo_megatron.mixers.megatron_layers import Backend, HeadRMSNorm, Rotary
from hylo_megatron.parallel.halo import Reach, with_halo
from hylo_megatron.parallel.zigzag import chunk_starts, from_rows, to_rows, zigzag_positions


def window_of(arch: Architecture, backend: Backend) -> Callable | None:
    """Return what makes a layer's window, or None. All layers share the tables, whatever mixer they have."""
    if not arch.window:
        return None
    return partial(WindowAttention, arch=arch, backend=backend, tables=Tables(arch))


class Tables:
    """Rotations of queries and keys, and masks, of a rank's tokens: one of each for every shape."""

    def __init__(self, arch: Architecture):
        self.window, self.rotary, self.masks, self.far = arch.window, Rotary(arch, arch.head_dim), {}, {}

    def mask(self, q_SBHK: Tensor, groups: int, reach: Reach, rank: int) -> Tensor:
        """Return the mask of a rank's chunks with the keys before them, which all sequences share."""
        key = reach, rank, q_SBHK.shape[2], groups, q_SBHK.dtype, q_SBHK.device
        if key not in self.masks:
            starts, device = chunk_starts(reach.length, reach.ranks, rank), q_SBHK.device
            chunk = reach.length // len(starts)
            at = [torch.arange(start - reach.before, start + chunk, device=device) for start in starts]
            sinks = torch.arange(reach.first, device=device).expand(len(starts), -1)
            self.masks[key] = window_mask(
                torch.stack(at).clamp(min=PADDING), sinks, chunk, self.window, shared=q_SBHK.shape[2] // groups,
                dtype=q_SBHK.dtype,
            )  # fmt: skip
        return self.masks[key]

    def rotate_far(self, q_SBHK: Tensor, ranks: int, rank: int) -> Tensor:
        """Rotate queries by the positions at which they meet the sinks."""
        key = len(q_SBHK), ranks, rank, q_SBHK.device
        if key not in self.far:
            at = far_positions(zigzag_positions(*key[:3]), self.window)
            table = cos_and_sin(at, self.rotary.frequencies, self.rotary.scaling)
            self.far[key] = tuple(part.to(q_SBHK.device) for part in table)
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
        self.tables, self.cp_group = tables, pg_collection.cp

    def forward(self, hidden_states: Tensor) -> Tensor:
        q_SBHK, k_SBGK, v_SBGK = self.get_query_key_value_tensors(hidden_states)
        tables, ranks, rank = self.tables, self.cp_group.size(), self.cp_group.rank()
        reach = Reach.of_window(tables.window["size"], tables.window["sinks"], ranks, len(q_SBHK))
        fetched = with_halo(torch.cat([tables.rotary(k_SBGK, ranks, rank), v_SBGK], -1), reach, self.cp_group)
        chunks = len(chunk_starts(reach.length, ranks, rank))
        turned = tables.rotary(q_SBHK, ranks, rank), tables.rotate_far(q_SBHK, ranks, rank)
        gate_SBH = self.gate_proj(hidden_states)[0][..., : q_SBHK.shape[2]]  # zeros behind it align its rows
        gate_SBH = 2 * gate_SBH.float().sigmoid().to(q_SBHK.dtype)
        mask = tables.mask(q_SBHK, k_SBGK.shape[2], reach, rank)
        out_BSHK = window_attention(*(to_rows(q, chunks) for q in turned), *fetched(), mask, tables.window)
        return self.linear_proj((from_rows(out_BSHK, chunks) * gate_SBH.unsqueeze(-1)).flatten(2))[0]
