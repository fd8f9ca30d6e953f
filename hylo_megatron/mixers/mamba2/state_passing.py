"""Mamba-2's scan (arXiv 2405.21060, section 2.1) over a sequence that ranks share.

``parallel/state_passing.py`` says how.
Legend: B chunks of sequences, S positions, H heads, P head dim, G groups, N state.
"""

import torch
from torch import Tensor

from hylo_megatron.kernels import Ops
from hylo_megatron.parallel.state_passing import starts


def chunk_ssd(
    local: Ops, group, x_BSHP: Tensor, dt_BSH: Tensor, A_H: Tensor, B_BSGN: Tensor, C_BSGN: Tensor,
    chunk_size: int = 64, D: Tensor | None = None, *_,
) -> tuple[Tensor, None]:  # fmt: skip
    """Do as ``ssd.ssd_chunk_scan`` does; a head's ``transfer`` is one number, its decay over the chunk."""
    out_BSHP, written = local.chunk_ssd(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, chunk_size, D, output_final_state=True)
    decay_BSH = (dt_BSH * A_H).double().cumsum(1).to(written.dtype).exp()
    start_BHPN = starts(decay_BSH[:, -1, :, None, None], written, group)
    start = start_BHPN.unflatten(1, (C_BSGN.shape[2], -1)).to(C_BSGN.dtype)
    read_BSHP = torch.einsum("bsgn,bghpn->bsghp", C_BSGN, start).flatten(2, 3)
    return (out_BSHP + decay_BSH.unsqueeze(-1) * read_BSHP).to(out_BSHP.dtype), None
