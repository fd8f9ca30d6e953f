"""The positions that a context-parallel rank holds: Megatron's zig-zag order, which balances causal attention."""

import functools

import torch
from torch import Tensor


@functools.lru_cache(maxsize=8)
def zigzag_positions(local_length: int, cp_size: int, cp_rank: int) -> Tensor:
    """Return the positions of a rank's tokens: chunks ``rank`` and ``2 cp - 1 - rank`` of ``2 cp`` equal chunks."""
    starts = chunk_starts(local_length, cp_size, cp_rank)
    return torch.cat([torch.arange(start, start + local_length // len(starts)) for start in starts])


def chunk_starts(local_length: int, cp_size: int, cp_rank: int) -> tuple[int, ...]:
    """Return the first position of each of a rank's chunks; a rank alone has one chunk."""
    if cp_size == 1:
        return (0,)
    half = local_length // 2
    return cp_rank * half, (2 * cp_size - 1 - cp_rank) * half


def to_rows(x_SB: Tensor, chunks: int = 1) -> Tensor:
    """``[chunks S, B, ..] -> [chunks B, S, ..]``: each chunk of each sequence becomes a row of its own."""
    return x_SB.unflatten(0, (chunks, -1)).transpose(1, 2).flatten(0, 1)


def from_rows(x_BS: Tensor, chunks: int = 1) -> Tensor:
    """Undo ``to_rows``."""
    return x_BS.unflatten(0, (chunks, -1)).transpose(1, 2).flatten(0, 1)
