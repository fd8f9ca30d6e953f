"""The recurrences of linear blocks over a sequence that ranks share. ``parallel/state_passing.py`` says how.

Legend: B chunks of sequences, S positions, M key heads, H value heads, K key dim, V value dim; Mamba-2: P head dim,
G groups, N state.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.kernels import Ops
from hylo_megatron.kernels.chunked import compute_dtype
from hylo_megatron.kernels.segments import in_segments
from hylo_megatron.parallel.state_passing import starts


def chunk_delta_rule(
    kernel: str,
    local: Ops,
    group,
    q_BSMK: Tensor,
    k_BSMK: Tensor,
    v_BSHV: Tensor,
    *,
    segment: int | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Do as ``kernel`` of ``Ops`` does, a gated delta rule (arXiv 2412.06464, section 3.1).

    K further values, all 0, whose state starts as the identity, come out as ``read`` and end as ``transfer``: one scan
    of width V + K is cheaper than two. ``segment``: positions that it reads at once (None: all).
    """
    key_dim, value_dim = k_BSMK.shape[-1], v_BSHV.shape[-1]

    def wider(q_BSMK, k_BSMK, v_BSHV, **rest):
        return getattr(local, kernel)(q_BSMK, k_BSMK, F.pad(v_BSHV, (0, key_dim)), **rest)

    eye = torch.eye(key_dim, dtype=compute_dtype(v_BSHV), device=v_BSHV.device)
    state = F.pad(eye, (value_dim, 0)).expand(len(v_BSHV), v_BSHV.shape[2], -1, -1)
    run = in_segments(wider, segment) if segment else wider
    out, last = run(q_BSMK, k_BSMK, v_BSHV, initial_state=state, output_final_state=True, **kwargs)
    out_BSHV, read_BSHK = out.split([value_dim, key_dim], -1)
    written, transfer = last.split([value_dim, key_dim], -1)
    start = starts(transfer, written, group)
    return out_BSHV + torch.einsum("bshk,bhkv->bshv", read_BSHK, start.to(read_BSHK.dtype)), None


def chunk_ssd(
    local: Ops, group, x_BSHP: Tensor, dt_BSH: Tensor, A_H: Tensor, B_BSGN: Tensor, C_BSGN: Tensor, chunk_size: int, D
) -> tuple[Tensor, None]:
    """Do as ``chunk_ssd`` of ``Ops`` does (arXiv 2405.21060, section 2.1).

    A head's ``transfer`` is one number, its decay over the chunk.
    """
    out_BSHP, written = local.chunk_ssd(x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, chunk_size, D, output_final_state=True)
    decay_BSH = (dt_BSH * A_H).double().cumsum(1).to(written.dtype).exp()
    start_BHPN = starts(decay_BSH[:, -1, :, None, None], written, group)
    start = start_BHPN.unflatten(1, (C_BSGN.shape[2], -1)).to(C_BSGN.dtype)
    read_BSHP = torch.einsum("bsgn,bghpn->bsghp", C_BSGN, start).flatten(2, 3)
    return (out_BSHP + decay_BSH.unsqueeze(-1) * read_BSHP).to(out_BSHP.dtype), None
