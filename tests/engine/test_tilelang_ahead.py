"""fla's kernel in tilelang, compiled beside the start of a training: for the same sizes as the training's own call."""

import os
import subprocess
import sys
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace

import pytest
from helpers import tiny

from hylo_megatron.engine import cpu, tilelang_ahead
from hylo_megatron.kernels.self_test import CASES
from hylo_megatron.packages import has
from hylo_megatron.parent import bind_child
from hylo_megatron.recipes.published import published
from hylo_megatron.recipes.shapes import shape, student_shape

LLAMA1B = student_shape(published("llama1b"), shape("llama1b"))
# What fla's call had on an H100 for this student (64K tokens): another argument is another file in tilelang's cache.
SEEN = dict(B=1, H=6, HV=6, K=256, V=512, BT=64, BK=64, BV=64, NK=4, hD1=256, hD2=512, dtype_str="bfloat16",
            USE_G=True, USE_DW=True, STATE_V_FIRST=False, IS_VARLEN=False, num_warps=4)  # fmt: skip


@pytest.fixture
def fla(monkeypatch):
    """fla's module with a tilelang that compiles nothing."""
    if not has("flash-linear-attention"):
        pytest.skip("flash-linear-attention is not installed")
    name = "fla.ops.common.backends.tilelang"
    package = pytest.importorskip(name)
    stand_in = ModuleType("tilelang")
    stand_in.__spec__ = ModuleSpec("tilelang", None)
    stand_in.jit = lambda **options: lambda build: build
    stand_in.PassConfigKey = SimpleNamespace(TL_DISABLE_TMA_LOWER=0, TL_ENABLE_FAST_MATH=1)
    stand_in.language = ModuleType("tilelang.language")
    for module in (stand_in, stand_in.language):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, f"{name}.chunk_bwd", raising=False)
    from fla.ops.common.backends.tilelang import chunk_bwd

    monkeypatch.setattr(chunk_bwd, "check_shared_mem", lambda: True)
    monkeypatch.setattr(package.CommonTileLangBackend, "is_available", lambda self: True)
    monkeypatch.setattr(package.CommonTileLangBackend, "is_enabled", lambda self: True)
    yield chunk_bwd
    sys.modules.pop(f"{name}.chunk_bwd", None)
    vars(package).pop("chunk_bwd", None)


def compiled(fla, monkeypatch, tmp_path, *flags, arch=LLAMA1B) -> dict:
    """Return what the kernel is made for, in a training with these flags."""
    found = []
    monkeypatch.setattr(fla, "_build_chunk_bwd_dqkwg_kernel", lambda **sizes: found.append(sizes))
    arch.save(tmp_path)
    given = ["--hylo-student", str(tmp_path), "--hylo-teacher", str(tmp_path), "--bf16", *flags]
    monkeypatch.setattr(sys, "argv", ["program", *given])
    tilelang_ahead.main()
    (sizes,) = found
    return sizes


def test_the_kernel_is_the_one_that_the_training_calls(fla, monkeypatch, tmp_path):
    assert compiled(fla, monkeypatch, tmp_path, "--seq-length", "65536", "--micro-batch-size", "1") == SEEN


@pytest.mark.parametrize("flags, ranks, changed", [
    (["--tensor-model-parallel-size", "2", "--micro-batch-size", "4"], 2, dict(B=4, H=3, HV=3)),
    (["--context-parallel-size", "2", "--micro-batch-size", "1"], 2, dict(B=2, V=768, hD2=768)),
], ids=["TP 2", "CP 2"])  # fmt: skip
def test_layouts_change_heads_rows_and_the_width_of_states(flags, ranks, changed, fla, monkeypatch, tmp_path):
    monkeypatch.setenv("WORLD_SIZE", str(ranks))
    assert compiled(fla, monkeypatch, tmp_path, "--seq-length", "8192", *flags) == SEEN | changed


@pytest.fixture
def started(monkeypatch):
    """Return the arguments of the processes that are started, on a machine with a GPU and tilelang."""
    found = []
    monkeypatch.setattr(cpu, "_is_available", lambda: True)
    monkeypatch.setattr(tilelang_ahead, "has", lambda name: True)
    monkeypatch.setattr(subprocess, "Popen", lambda command, **kwargs: found.append((command, kwargs)))
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    return found


def test_a_training_with_gated_delta_rules_starts_the_process(started):
    tilelang_ahead.compile_beside(LLAMA1B, ["--bf16"])
    ((command, kwargs),) = started
    assert command == [sys.executable, "-W", "ignore", "-m", "hylo_megatron.engine.tilelang_ahead", "--bf16"]
    assert kwargs["stdout"] == kwargs["stderr"] == subprocess.DEVNULL and kwargs["preexec_fn"].func is bind_child


@pytest.mark.parametrize("arch, variable", [
    (tiny.hybrid("mamba2"), {}),
    (LLAMA1B, {"LOCAL_RANK": "1"}),
    (LLAMA1B, {"HYLO_COMPILE_AHEAD": "0"}),
], ids=["no such blocks", "another rank", "turned off"])  # fmt: skip
def test_no_process_is_started_in_vain(arch, variable, started, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ | variable)
    tilelang_ahead.compile_beside(arch, [])
    assert not started


def test_the_training_checks_the_recurrence_after_its_other_kernels():
    """The process beside it then has time to compile the kernel, which the training otherwise compiles too."""
    assert {kind: list(cases)[-1] for kind, cases in CASES.items()} == {
        "gdn": "gated delta rule", "kda": "Kimi delta attention", "mamba2": "state-space scan"
    }  # fmt: skip
