"""The gated delta rule (arXiv 2412.06464, section 3.1) over a sequence that ranks share; Kimi Delta Attention's too.

``parallel/state_passing.py`` says how.
Legend: B chunks of sequences, S positions, M key heads, H value heads, K key dim, V value dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.kernels import Ops
from hylo_megatron.kernels.chunked import compute_dtype
from hylo_megatron.parallel.state_passing import starts


def chunk_delta_rule(
    kernel: str, local: Ops, group, q_BSMK: Tensor, k_BSMK: Tensor, v_BSHV: Tensor, g: Tensor, beta: Tensor, **kwargs
) -> tuple[Tensor, None]:
    """Do as ``kernel`` of ``local`` does for a sequence on one rank.

    K further values, all 0, whose state starts as the identity, come out as ``read`` and end as ``transfer``: one scan
    of width V + K is cheaper than two.
    """
    key_dim, value_dim = k_BSMK.shape[-1], v_BSHV.shape[-1]
    eye = torch.eye(key_dim, dtype=compute_dtype(v_BSHV), device=v_BSHV.device)
    state = F.pad(eye, (value_dim, 0)).expand(len(v_BSHV), v_BSHV.shape[2], -1, -1)
    wider_BSHV = F.pad(v_BSHV, (0, key_dim))
    out, last = getattr(local, kernel)(
        q_BSMK, k_BSMK, wider_BSHV, g=g, beta=beta, initial_state=state, output_final_state=True, **kwargs
    )
    out_BSHV, read_BSHK = out.split([value_dim, key_dim], -1)
    written, transfer = last.split([value_dim, key_dim], -1)
    start = starts(transfer, written, group)
    return out_BSHV + torch.einsum("bshk,bhkv->bshv", read_BSHK, start.to(read_BSHK.dtype)), None
