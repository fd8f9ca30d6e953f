"""Triton's tuner with the candidates of a table, for a GPU that is not there."""

import json
import subprocess
import sys

import pytest
from helpers.paths import ROOT

from hylo_megatron.engine import compile_ahead, cpu, few_candidates, kernel_cache
from hylo_megatron.engine.register import installed, patches
from hylo_megatron.engine.tuned import KNOWN
from hylo_megatron.packages import has

if not has("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from helpers.no_gpu import NoGPU  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

NAME = f"{__name__}.halved"
FEW = (3, 0, "BLOCK=64 w2 s3", "BLOCK=64 w4 s3")
# Prints what fla offers on a Hopper GPU: each kernel's candidates.
OFFERED = """
import gc, json, sys
from types import SimpleNamespace
import torch
from helpers.no_gpu import NoGPU
from triton.runtime.driver import driver
driver._active = NoGPU()
torch.cuda.get_device_name = lambda *at: "NVIDIA H100"
torch.cuda.get_device_capability = lambda *at: (9, 0)
torch.cuda.device_count = lambda: 1
import hylo_megatron.kernels.fused
from triton.runtime.autotuner import Autotuner
from hylo_megatron.engine.few_candidates import name_of, text
tuners = {name_of(each): each for each in gc.get_objects() if isinstance(each, Autotuner)}
print(json.dumps({name: [each.cache_results, list(map(text, each.configs))] for name, each in tuners.items()}))
"""


@triton.jit
def halved(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 512, "too large")
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, tl.load(x_ptr + at, mask=at < size) / 2, mask=at < size)


def timed_once(call, quantiles):
    """Time a candidate: the one that is launched first is the best."""
    call()
    return [float(len(driver.active.launched))] * 3


def launched(decorator=triton.autotune, warps=(1, 2, 4), large=(), **options) -> list[int]:
    """Run the kernel with a new tuner, as a new process does. Return each launch's warps: trials, then the best."""
    configs = [triton.Config({"BLOCK": 1024 if each in large else 64}, num_warps=each) for each in warps]
    options = {"cache_results": True} | options
    halved.device_caches.clear()
    driver.active.launched.clear()
    kernel = decorator(configs, key=["size"], do_bench=timed_once, **options)(halved)
    kernel[(2,)](torch.ones(128), torch.empty(128), 128)
    return list(driver.active.launched)


@pytest.fixture
def hopper(tmp_path, monkeypatch):
    """A driver without a GPU, an empty cache folder, and a table with two of the kernel's three candidates."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(driver, "_active", NoGPU())
    monkeypatch.setitem(KNOWN, "cuda 90", {NAME: FEW})
    monkeypatch.delenv(few_candidates.SWITCH, raising=False)
    yield monkeypatch
    halved.device_caches.clear()


def test_known_candidates_alone_are_timed(hopper):
    with installed("tuning"):
        assert launched() == [2, 4, 2]
        assert launched() == [2]  # the next process reads the result
    assert launched(cache_results=False) == [1, 2, 4, 1]


@pytest.fixture
def fla_cache_autotune():
    """fla's own decorator, imported before ``hopper``: fla keeps what it finds of the GPU."""
    return pytest.importorskip("fla.ops.utils.cache").fla_cache_autotune


def test_the_tuner_of_fla_is_reached(fla_cache_autotune, hopper):
    with installed("tuning"):
        assert launched(fla_cache_autotune) == [2, 4, 2]


def test_what_is_not_known_is_timed_whole(hopper):
    with installed("tuning"):
        assert launched(warps=(1, 2, 4, 8)) == [1, 2, 4, 8, 1]  # another version offers more
        assert launched(warps=(1, 2, 8)) == [1, 2, 8, 1]  # or others
        assert launched(cache_results=False) == [1, 2, 4, 1]
        hopper.setitem(KNOWN, "cuda 90", {"fla.ops.halved": FEW})
        hopper.setattr(few_candidates, "WIDTHS", ("x_ptr",))  # in another kernel this name may be a tensor's
        assert launched() == [1, 2, 4, 1]


def test_heads_wider_than_those_timed_have_all_timed(hopper):
    hopper.setattr(few_candidates, "WIDTHS", ("size",))  # 128 in this call
    with installed("tuning"):
        hopper.setitem(KNOWN, "cuda 90", {NAME: (3, 128, *FEW[2:])})
        assert launched() == [2, 4, 2]
        hopper.setitem(KNOWN, "cuda 90", {NAME: (3, 127, *FEW[2:])})
        assert launched() == [1, 2, 4, 1]


def test_another_card_times_all(hopper):
    hopper.setattr(NoGPU, "get_current_target", lambda self: GPUTarget("cuda", 80, 32))
    with installed("tuning"):
        assert launched() == [1, 2, 4, 1]


def test_the_switch_times_all_and_reads_no_result_of_few(hopper):
    with installed("tuning"):
        assert launched() == [2, 4, 2]
    hopper.setenv(few_candidates.SWITCH, "1")
    with installed("tuning"):
        assert launched() == [1, 2, 4, 1]


def test_a_stored_result_of_all_is_read_before_few_are_timed(hopper):
    assert launched() == [1, 2, 4, 1]
    with installed("tuning"):
        assert launched() == [1]  # the best of all, which is not in the table


def test_all_are_timed_where_no_known_candidate_runs(hopper):
    hopper.setitem(KNOWN, "cuda 90", {NAME: (3, 0, "BLOCK=1024 w2 s3", "BLOCK=1024 w4 s3")})
    with installed("tuning"):
        assert launched(large=(2, 4)) == [1, 1]
        assert launched(large=(2, 4)) == [1]


def test_each_switch_turns_its_own_off(hopper):
    tuning = []
    hopper.setattr(cpu, "without_cuda", lambda: False)
    hopper.setattr(kernel_cache, "install", lambda group: tuning.append({entry.target for entry in needed()}))

    def needed():
        return [entry for entry in patches("tuning") if entry.needed()]

    for off in ({few_candidates.SWITCH: "1"}, {compile_ahead.SWITCH: "0"}, {}):
        for switch in (few_candidates.SWITCH, compile_ahead.SWITCH):
            hopper.setenv(switch, off.get(switch, ""))
        kernel_cache.prepare_kernels()
    ahead, few, both = tuning
    assert ahead and few and not ahead & few and both == ahead | few
    hopper.setenv(few_candidates.SWITCH, "1")
    hopper.setenv(compile_ahead.SWITCH, "0")
    kernel_cache.prepare_kernels()
    assert len(tuning) == 3


def test_a_candidate_is_written_with_what_is_rare():
    plain = triton.Config({"BV": 32, "BK": 64}, num_warps=2)
    assert few_candidates.text(plain) == "BK=64 BV=32 w2 s3"
    rare = triton.Config({}, num_ctas=2, maxnreg=128)
    assert few_candidates.text(rare) == "w4 s3 ctas=2 maxnreg=128"


def test_rows_come_out_of_a_cache_folder(hopper, tmp_path, capsys):
    """A result of few says nothing about the others, and is left out."""
    hopper.syspath_prepend(ROOT / "tools" / "bench")
    import tuned_table

    with installed("tuning"):
        launched()
    launched(warps=(1, 2, 4, 8))
    hopper.setattr(sys, "argv", ["tuned_table.py", str(tmp_path)])
    tuned_table.main()
    row = (4, 0, "BLOCK=64 w1 s3", "BLOCK=64 w2 s3")
    assert capsys.readouterr().out == f'"halved": {row},  # 1 timed, 0.0% and 100.0% slower\n'
    hopper.setattr(sys, "argv", ["tuned_table.py", str(tmp_path / "nothing")])
    with pytest.raises(SystemExit, match="no .* found"):
        tuned_table.main()


@pytest.mark.skipif(not has("flash-linear-attention"), reason="fla is not installed")
def test_the_table_holds_what_fla_offers():
    """An upgrade of fla fails here first: a kernel whose candidates have changed is tuned whole."""
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", "PATH": "/usr/bin:/bin"}
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", OFFERED], env=path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    for name, (offered, _, *best) in KNOWN["cuda 90"].items():
        keeps_results, candidates = found[name]
        assert keeps_results and len(candidates) == offered and set(best) < set(candidates), name
        assert 2 <= len(set(best)) == len(best) <= 4  # a later Triton does not time a single one, which may not run
