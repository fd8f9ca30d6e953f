"""The Triton kernel that draws tokens against its reference, in Triton's interpreter on a CPU."""

import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT
from helpers.waits import PATIENCE

SCRIPT = """
import torch
from hylo_megatron.kernels import draw, triton_draw
torch.manual_seed(0)
uniform = draw.uniforms(3, torch.arange(6), torch.full((6,), 7))
uniform[0] = 0.0
for top_p, temperature, size in ((1.0, 0.7, 300), (0.9, 1.0, 5000), (0.3, 1.0, 40)):
    logits = 3 * torch.randn(6, size)
    arguments = logits, uniform, temperature, top_p
    assert torch.equal(triton_draw.draw(*arguments), draw.draw(*arguments)), (top_p, temperature, size)
uniform[:] = 1 - 2**-24  # rounding may leave nothing beyond: the last kept token is drawn
logits = torch.tensor([[3.0, 0.1, 2.9, -9.0]]).expand(6, 4).contiguous()
assert triton_draw.draw(logits, uniform, 1.0, 0.9).eq(2).all()
print("equal")
"""


def test_the_kernel_draws_the_references_tokens():
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", SCRIPT], env=environment, capture_output=True, text=True, timeout=PATIENCE
    )
    assert result.returncode == 0 and result.stdout == "equal\n", result.stderr[-3000:]
