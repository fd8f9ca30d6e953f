"""Rotary position embeddings of queries and keys in training: the engine's attention gets none, ours turns its own."""

import torch
from torch import Tensor

from hylo_megatron.kernels import ops_for
from hylo_megatron.kernels.rope import rope_frequencies
from hylo_megatron.parallel.zigzag import zigzag_positions


class Rotary:
    """``rotary(x_SBHd, ranks, rank)`` rotates the whole head by the positions of a context-parallel rank; layers may
    share one. It keeps a table for each length."""

    def __init__(self, rope_parameters: dict, dim: int, max_positions: int):
        self.frequencies, self.scaling = rope_frequencies(rope_parameters, dim, max_positions)
        self.tables: dict[tuple, tuple[Tensor, Tensor]] = {}

    def table(self, local_length: int, ranks: int, rank: int, device) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the rank's positions, fp32 ``[S, dim / 2]``."""
        key = (local_length, ranks, rank, device)
        if key not in self.tables:
            angles = torch.outer(zigzag_positions(*key[:3]).float(), self.frequencies)
            self.tables[key] = tuple((part * self.scaling).to(device) for part in (angles.cos(), angles.sin()))
        return self.tables[key]

    def __call__(self, x_SBHd: Tensor, ranks: int, rank: int) -> Tensor:
        return ops_for(x_SBHd).rotate(x_SBHd, *self.table(len(x_SBHd), ranks, rank, x_SBHd.device))
