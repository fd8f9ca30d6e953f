"""What our state-space scan gives to fla's kernels, which read memory without a look at strides."""

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.waits import PATIENCE

from hylo_megatron.packages import has

# fla's kernels are replaced by functions that keep the gradient of the last state.
SCRIPT = """
import torch
from hylo_megatron.kernels import fused

B, S, H, P, N = 2, 64, 3, 16, 32
given = []

def backward_of_states(*, k, v, dht, **others):
    given.append(dht)
    return k.new_zeros(B, 1, H, N, P), None

fused.chunk_local_cumsum = lambda g, **others: g.clone()
fused.chunk_fwd_h = lambda k, v, **others: (k.new_zeros(B, 1, H, N, P), k.new_zeros(B, H, N, P))
fused.chunk_fwd_o = lambda v, **others: torch.zeros_like(v)
fused.chunk_bwd_dh = backward_of_states
fused.chunk_bwd_dqkwg = lambda q, k, g, **others: (torch.zeros_like(q), torch.zeros_like(k), None, torch.zeros_like(g))
fused.chunk_bwd_dv = lambda do, **others: torch.zeros_like(do)
x, weight = torch.randn(B, S, H, P, requires_grad=True), torch.randn(B, H, P, N)
others = torch.rand(B, S, H), -torch.rand(H), torch.randn(B, S, 1, N), torch.randn(B, S, 1, N)
for what, loss, want in (
    ("weighted", lambda last: (last * weight).sum(), weight),
    ("summed", lambda last: last.sum(-1).mul(weight[..., 0]).sum(), weight[..., :1].expand(B, H, P, N)),
):
    out, last = fused.chunk_ssd(x, *others, output_final_state=True)
    assert last.shape == (B, H, P, N)
    (loss(last) + out.sum()).backward()
    assert given[-1].is_contiguous() and torch.equal(given[-1], want.mT), what
out, _ = fused.chunk_ssd(x, *others)
out.sum().backward()
print(len(given))
"""


def test_the_gradient_of_the_last_state_is_contiguous():
    if not (has("triton") and has("flash-linear-attention")):
        pytest.skip("triton or flash-linear-attention is not installed")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert done.stdout.strip() == "3", done.stderr[-2000:]
