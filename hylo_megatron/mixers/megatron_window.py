"""The window beside a linear block for megatron-core: softmax attention over the last tokens and the first ones.

Tensor parallelism splits heads, as in the base model's attention. Every rank needs complete sequences
(``config/layout.py`` refuses context parallelism). Legend: S sequence, B batch, D model, H query heads and G key heads
of this rank, K head dim.
"""

from collections.abc import Callable
from functools import partial

from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from torch import Tensor

from hylo_megatron.config import Architecture
from hylo_megatron.config.positions import Window
from hylo_megatron.kernels.window import sequence_attention, sequence_mask
from hylo_megatron.mixers.megatron_layers import Backend, HeadRMSNorm, Rotary


def window_of(arch: Architecture, backend: Backend) -> Callable | None:
    """Return what makes a layer's window, or None. All layers share the rotary tables and the masks."""
    if not arch.window:
        return None
    rotary, masks = Rotary(arch, arch.head_dim), Masks(arch.window)
    return partial(WindowAttention, arch=arch, backend=backend, rotary=rotary, masks=masks)


class Masks:
    """Masks of complete sequences, one for each shape of a micro-batch."""

    def __init__(self, window: Window):
        self.window, self.held = window, {}

    def __call__(self, q_BSHK: Tensor, groups: int) -> Tensor:
        key = (*q_BSHK.shape[:3], groups, q_BSHK.dtype, q_BSHK.device)
        if key not in self.held:
            self.held[key] = sequence_mask(q_BSHK, groups, self.window)
        return self.held[key]


class WindowAttention(SelfAttention):
    """``hidden_SBD -> out_SBD``: the base model's attention within the window.

    Each head is multiplied by twice the sigmoid of ``gate_proj``.
    """

    def __init__(self, config, *, arch: Architecture, backend: Backend, rotary: Rotary, masks: Masks,
                 layer_number: int, pg_collection):  # fmt: skip
        head_norm = HeadRMSNorm if arch.qk_norm else None
        submodules = SelfAttentionSubmodules(
            linear_qkv=backend.column_linear, linear_proj=backend.row_linear, core_attention=IdentityOp,
            q_layernorm=head_norm, k_layernorm=head_norm,
        )  # fmt: skip
        super().__init__(config, submodules, layer_number, AttnMaskType.causal, pg_collection=pg_collection)
        gate = partial(backend.column, config=config, tp_group=pg_collection.tp, kind=backend.projection)
        self.gate_proj = gate(config.hidden_size, config.num_attention_heads)
        self.rotary, self.masks = rotary, masks

    def forward(self, hidden_states: Tensor) -> Tensor:
        q_SBHK, k_SBGK, v_SBGK = self.get_query_key_value_tensors(hidden_states)
        q_SBHK, k_SBGK = (self.rotary(x, 1, 0) for x in (q_SBHK, k_SBGK))
        q_BSHK, k_BSGK, v_BSGK = (x.transpose(0, 1) for x in (q_SBHK, k_SBGK, v_SBGK))
        mask = self.masks(q_BSHK, k_BSGK.shape[2])
        out_BSHK = sequence_attention(q_BSHK, k_BSGK, v_BSGK, self.masks.window, mask)
        gate_SBH = self.gate_proj(hidden_states)[0][..., : out_BSHK.shape[2]]  # zeros behind it align its rows
        gate_SBH = 2 * gate_SBH.float().sigmoid().to(out_BSHK.dtype)
        return self.linear_proj((out_BSHK.transpose(0, 1) * gate_SBH.unsqueeze(-1)).flatten(2))[0]
