"""The Triton kernel for decoded tokens, in Triton's interpreter on a CPU, and the check that chooses it or not."""

import os
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

import pytest
import torch
from helpers.paths import ROOT
from helpers.waits import PATIENCE

from hylo_megatron.kernels.window_cache import TokenPlan
from hylo_megatron.kernels.window_decode import kernel_fault

triton_window = pytest.importorskip("hylo_megatron.kernels.triton_window", reason="triton is not installed")
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
SIZES = [(9, 3, 64, 256, 4), (4, 2, 24, 5, 0), (2, 2, 128, 1, 1), (7, 1, 80, 3, 4), (40, 2, 16, 65, 64)]


def fault(*sizes: int, dtype: torch.dtype = torch.float32) -> str:
    return kernel_fault.__wrapped__(*sizes, dtype, torch.device("cpu"))


def test_the_kernel_in_tritons_interpreter():
    """Runs the tests of requests, and those below of the kernel's own check, in a process of its own."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": f"{ROOT}:{ROOT}/tests"}
    files = Path(__file__), Path(__file__).with_name("test_window_cache.py")
    words = "interpreted or several_requests or test_padding"
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files, "-k", words],
                          env=environment | {"CUDA_VISIBLE_DEVICES": ""}, cwd=ROOT, capture_output=True, text=True,
                          timeout=PATIENCE)  # fmt: skip
    assert "31 passed" in done.stdout and not done.returncode, done.stdout[-3000:] + done.stderr[-2000:]


@pytest.mark.skipif(not INTERPRETED, reason="test_the_kernel_in_tritons_interpreter runs this")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])  # the interpreter has no products of bf16
@pytest.mark.parametrize("sizes", SIZES)
def test_the_check_finds_no_fault_interpreted(sizes, dtype):
    assert fault(*sizes, dtype=dtype) == ""


@pytest.mark.skipif(INTERPRETED, reason="the interpreter compiles nothing")
@pytest.mark.parametrize("sizes", [(9, 3, 64, 256, 4), (32, 8, 64, 256, 4), (24, 8, 128, 256, 4), *SIZES[1:]])
@pytest.mark.parametrize("kept", [torch.bfloat16, torch.float32])
def test_the_kernel_compiles_for_a_hopper_gpu(sizes, kept, tmp_path, monkeypatch):
    """In bf16, with caches in bf16 or fp32, down to the machine code and within the shared memory of a block."""
    from helpers.no_gpu import NoGPU
    from triton.runtime.driver import driver

    heads, groups, dim, size, sinks = sizes
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NoGPU())
    new = defaultdict(triton_window._decode.device_caches.default_factory)
    monkeypatch.setattr(triton_window._decode, "device_caches", new)
    near, kv = (torch.zeros(2, n, width, dtype=torch.bfloat16) for n, width in ((heads, dim), (groups, 2 * dim)))
    cache, at = torch.zeros(3, groups, size + sinks, 2 * dim, dtype=kept), torch.zeros(2, dtype=torch.int64)
    triton_window.decode(near, near, kv, cache, at, at.int(), {"size": size, "sinks": sinks}, near.clone())
    assert driver.active.launched == [4 if dim <= 64 else 8]


def exact(near, far, kv, cache, at, slots, window, out) -> None:
    """Stands for the kernel."""
    real, shared = slots > 0, near.shape[1] // kv.shape[1]
    plan = TokenPlan.of(at[real], slots[real], window, shared=shared, dtype=near.dtype)
    out[real] = plan.attend(near[real], far[real], kv[real], cache)


def without_far(near, far, *rest) -> None:
    exact(near, near, *rest)


def forgetful(near, far, kv, cache, *rest) -> None:
    exact(near, far, kv, cache.clone(), *rest)


def heedless(near, far, kv, cache, at, slots, window, out) -> None:
    exact(near, far, kv, cache, at, slots, window, out)
    out[slots <= 0] = 1


def not_a_number(near, *rest) -> None:
    exact(near * torch.nan, *rest)


def broken(*_) -> None:
    raise RuntimeError("no image for\nthis device")


@pytest.mark.parametrize("decode, says", [
    (exact, ""),
    (without_far, "disagrees with the reference (relative error"),
    (not_a_number, "disagrees with the reference (relative error nan"),
    (forgetful, "writes other keys and values"),
    (heedless, "writes to tokens that are padding"),
    (broken, "does not run here (RuntimeError: no image for)"),
])  # fmt: skip
def test_a_wrong_kernel_is_found(decode, says, monkeypatch):
    monkeypatch.setattr(triton_window, "decode", decode)
    found = fault(4, 2, 16, 12, 3)
    assert (says in found) if says else (found == "")
