"""Rotary position embeddings of queries and keys in training: the engine's attention gets none, ours turns its own."""

import torch
from torch import Tensor

from hylo_megatron.kernels import ops_for
from hylo_megatron.kernels.rope import rope_frequencies
from hylo_megatron.layers.zigzag import zigzag_positions


class Rotary:
    """``rotary(x_SBHd, cp_group)`` rotates the whole head; layers may share one. It keeps a table for each length."""

    def __init__(self, rope_parameters: dict, dim: int, max_positions: int):
        self.frequencies, self.scaling = rope_frequencies(rope_parameters, dim, max_positions)
        self.tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def table(self, local_length: int, cp_group, device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of this rank's positions, fp32 ``[S, dim / 2]``."""
        key = (local_length, cp_group.size(), cp_group.rank(), device)
        if key not in self.tables:
            angles = torch.outer(zigzag_positions(*key[:3]).float(), self.frequencies)
            self.tables[key] = tuple((part * self.scaling).to(device) for part in (angles.cos(), angles.sin()))
        return self.tables[key]

    def __call__(self, x_SBHd: Tensor, cp_group) -> Tensor:
        return ops_for(x_SBHd).rotate(x_SBHd, *self.table(len(x_SBHd), cp_group, x_SBHd.device))
