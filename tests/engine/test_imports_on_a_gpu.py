"""What a training on a GPU imports with megatron-core, tried without one."""

import subprocess
import sys

import pytest

from hylo_megatron.packages import has

if not (has("megatron-core") and has("flash-linear-attention")):
    pytest.skip("megatron-core or flash-linear-attention is not installed", allow_module_level=True)

PROGRAM = """
import sys, torch
from hylo_megatron.engine import cpu
cpu.without_cuda = lambda: False
from hylo_megatron.engine.register import import_megatron
compiler = torch.compile
import_megatron()
assert "fla.modules" in sys.modules and torch.compile is compiler
print("Inductor" if "torch._inductor.compile_fx" in sys.modules else "no Inductor")
"""


def test_inductor_is_not_imported():
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", PROGRAM], capture_output=True, text=True)
    assert done.stdout.split("\n")[-2:] == ["no Inductor", ""], done.stderr
