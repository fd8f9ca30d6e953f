"""Our Triton kernels against their torch references, values and gradients, in Triton's interpreter on a CPU."""

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.waits import PATIENCE

SCRIPT = """
import torch
from triton.runtime import interpreter  # with TRITON_INTERPRET=1 kernels run as numpy
from hylo_megatron.kernels import (
    attention, conv, fp8, norm, rope, triton_attention, triton_conv, triton_fp8, triton_pointwise,
)

def compare(fused, reference, inputs):
    results = []
    for run in (fused, reference):
        leaves = [x.detach().clone().requires_grad_() for x in inputs]
        outs = run(*leaves)
        outs = outs if isinstance(outs, tuple) else (outs,)
        torch.manual_seed(1)
        loss = sum((out * torch.randn(out.shape)).sum() for out in outs)
        results.append([*outs, *torch.autograd.grad(loss, leaves)])
    for got, want in zip(*results, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)

def split(module, sequence_first, bias):
    def run(x, weight, *rest):
        x = x.transpose(0, 1) if sequence_first else x
        return module.split_convolve(x, weight, rest[0] if bias else None, (16, 80, 24, 8, 18), start=16)
    return run

torch.manual_seed(0)
for sequence_first in (True, False):
    for bias in (True, False):
        x = torch.randn(350, 2, 160) if sequence_first else torch.randn(2, 350, 160)  # 14 columns are nobody's
        inputs = [x, torch.randn(104, 4)] + [torch.randn(104)] * bias
        compare(split(triton_conv, sequence_first, bias), split(conv, sequence_first, bias), inputs)
x, y = torch.randn(3, 7, 1060), torch.randn(3, 7, 530)
compare(triton_pointwise.swiglu_packed, norm.swiglu_packed, [x])
compare(lambda a: triton_pointwise.distance(a, y), lambda a: norm.distance(a, y), [x[..., :530]])
assert torch.autograd.grad(triton_pointwise.distance(y.requires_grad_(), y.detach()).sum(), y)[0].eq(0).all()
rms = [lambda x, w, module=module: module.rms_norm(x, w, 1e-5) for module in (triton_pointwise, norm)]
compare(*rms, [torch.randn(3, 70, 530), torch.randn(530)])
angles = torch.rand(7, 8) * 6
turn = [lambda x, module=module: module.rotate(x, angles.cos(), angles.sin()) for module in (triton_pointwise, rope)]
compare(*turn, [torch.randn(7, 3, 5, 16)])
compare(*([lambda x, f=f: f(x.transpose(0, 1)[..., 4:20]) for f in turn]), [torch.randn(3, 7, 5, 24)])
x = torch.randn(9, 200, dtype=torch.bfloat16) * torch.logspace(-6, 4, 9, dtype=torch.bfloat16)[:, None]
x[3] = 0
(got, got_scale), (want, want_scale) = (module.quantise_rows(x) for module in (triton_fp8, fp8))
assert torch.equal(got_scale, want_scale)
# the interpreter rounds ties away from zero, and halves a value that it rounds up to a power of two
assert (got.float() == want.float()).float().mean() > 0.95
for tail in ((), (1,)):  # cuDNN's denominators have one dimension more
    q, k, v = torch.randn(2, 3, 41, 24), torch.randn(2, 3, 60, 24), torch.randn(2, 3, 60, 40)
    want, want_lse = attention.attend_plain(q, k, v, False, 0.3)
    blocks = [(k[:, :, keys], v[:, :, keys]) for keys in (slice(0, 7), slice(7, 60))]
    for joined in (attention, triton_attention):
        (out, lse), part = (attention.attend_plain(q, *block, False, 0.3) for block in blocks)
        lse, part_lse = lse.view(2, 3, 41, *tail), part[1].view(2, 3, 41, *tail)
        rows = slice(5, 41)
        joined.join_attention(out[:, :, rows], lse[:, :, rows], part[0][:, :, rows], part_lse[:, :, rows])
        torch.testing.assert_close(out[:, :, rows], want[:, :, rows], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(lse.view(2, 3, 41)[:, :, rows], want_lse[:, :, rows], rtol=1e-4, atol=1e-5)
print("equal")
"""


def test_kernels_equal_their_references():
    pytest.importorskip("triton")
    root = str(ROOT)
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": root, "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.stdout.strip().endswith("equal"), result.stderr[-2000:]
