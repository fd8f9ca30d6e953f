"""Triton's candidates compiled ahead, for a GPU that is not there, and cache folders that move."""

import json
import shutil
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
from helpers.paths import ROOT

from hylo_megatron.engine import compile_ahead, kernel_cache
from hylo_megatron.packages import has

if not has("triton"):
    pytest.skip("triton is not installed", allow_module_level=True)
import torch  # noqa: E402
import triton  # noqa: E402
import triton.language as tl  # noqa: E402
from helpers.no_gpu import NoGPU  # noqa: E402
from triton.runtime.driver import driver  # noqa: E402

from hylo_megatron.engine.register import installed  # noqa: E402


@triton.jit
def doubled(x_ptr, y_ptr, size, BLOCK: tl.constexpr):
    tl.static_assert(BLOCK < 512, "too large")
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + at, 2 * tl.load(x_ptr + at, mask=at < size), mask=at < size)


def timed_once(call, quantiles):
    """Time a candidate: the one that is launched first is the best."""
    call()
    return [float(len(driver.active.launched))] * 3


@pytest.fixture
def compiled(tmp_path, monkeypatch):
    """A driver without a GPU, an empty cache folder, and for each compiled candidate the thread that compiled it."""
    found = []
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "triton"))
    monkeypatch.setattr(driver, "_active", NoGPU())
    monkeypatch.setattr(triton.knobs.compilation, "listener", lambda **event: found.append(
        (threading.current_thread() is threading.main_thread(), event["cache_hit"])))  # fmt: skip
    doubled.device_caches.clear()
    yield found
    doubled.device_caches.clear()


def tuner(warps=(1, 2, 4), block=64, **options):
    configs = [triton.Config({"BLOCK": block}, num_warps=each) for each in warps]
    return triton.autotune(configs, key=["size"], do_bench=timed_once, **options)(doubled)


def launch(kernel) -> list:
    x = torch.ones(128)
    kernel[(2,)](x, torch.empty(128), 128)
    return driver.active.launched


def test_candidates_are_compiled_by_other_threads_and_timed_in_order(compiled):
    with installed("tuning"):
        kernel = tuner()
        assert launch(kernel) == [1, 2, 4, 1] and kernel.best_config.num_warps == 1
    assert compiled == [(False, False)] * 3
    launch(kernel)
    assert len(compiled) == 3


def test_without_it_they_are_compiled_one_by_one(compiled, monkeypatch):
    monkeypatch.setenv(compile_ahead.SWITCH, "0")
    with installed("tuning"):
        assert launch(tuner()) == [1, 2, 4, 1]
    assert compiled == [(True, False)] * 3


def test_a_candidate_that_does_not_compile_is_left_out(compiled, capsys):
    configs = [triton.Config({"BLOCK": block}, num_warps=1) for block in (1024, 128)]
    with installed("tuning"):
        kernel = triton.autotune(configs, key=["size"], do_bench=timed_once)(doubled)
        launch(kernel)
    assert kernel.best_config.kwargs == {"BLOCK": 128} and not capsys.readouterr().err


def test_a_tuner_goes_on_when_nothing_can_be_compiled_ahead(compiled, monkeypatch, capsys):
    def refuse(*arguments):
        raise RuntimeError("no threads\nat all")

    monkeypatch.setattr(compile_ahead, "compile_all", refuse)
    with installed("tuning"):
        assert launch(tuner()) == [1, 2, 4, 1]
    assert capsys.readouterr().err == "warning: doubled is compiled on one core (RuntimeError: no threads)\n"


def test_a_lock_that_is_never_released_delays_and_does_not_hang(tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    clock = [0.0]

    def sleep(seconds):
        clock[0] += seconds

    monkeypatch.setattr(compile_ahead, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=sleep))
    with compile_ahead.alone(), compile_ahead.alone():
        waited = clock[0]
    assert compile_ahead.PATIENCE < waited < compile_ahead.PATIENCE + 1
    with compile_ahead.alone():
        assert clock[0] == waited


def test_a_cache_that_was_copied_is_read_where_it_is_now(compiled, tmp_path, monkeypatch):
    """Triton names its files by absolute paths: without the correction everything is compiled again."""
    first, second, third = (tmp_path / name for name in ("first", "second", "third"))
    kernel_cache.follow_move(first)
    monkeypatch.setenv("TRITON_CACHE_DIR", str(first / "triton"))
    launch(tuner(warps=(1, 2), cache_results=True))
    assert compiled == [(True, False)] * 2
    for folder, correct in ((second, True), (third, False)):
        shutil.copytree(first, folder)
        if correct:
            kernel_cache.follow_move(folder)
    shutil.rmtree(first)
    for folder, again in ((second, [(True, True)]), (third, [(True, False)])):
        compiled.clear()
        doubled.device_caches.clear()
        monkeypatch.setenv("TRITON_CACHE_DIR", str(folder / "triton"))
        launch(tuner(warps=(1, 2), cache_results=True))
        assert compiled == again, folder  # the tuning result holds: one candidate is read, or compiled


def test_variables_of_the_user_stay(tmp_path):
    code = (
        "import json, os; from hylo_megatron.engine.kernel_cache import *; use_kernel_caches();"
        "print(json.dumps({name: os.environ.get(name) for name in [*CACHES, TUNING]}))"
    )

    def variables(**given):
        path = {"PATH": "/usr/bin:/bin", "HYLO_REGISTER": "0", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([sys.executable, "-c", code], env=path | given, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)

    assert not any(variables().values())
    given = dict(HYLO_KERNEL_CACHE=str(tmp_path))
    folders = {variable: str(tmp_path / name) for variable, name in kernel_cache.CACHES.items()}
    assert variables(**given) == folders | {kernel_cache.TUNING: "1"}
    mine = {"TRITON_CACHE_DIR": "/mine", kernel_cache.TUNING: "0"}
    assert variables(**given, **mine) == folders | mine
