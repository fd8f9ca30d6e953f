"""A step in which the host does not wait for the GPU: the same numbers as megatron's, and a log one step behind."""

import contextlib
import json
import math
import re
from types import SimpleNamespace

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers  # noqa: E402
from megatron.core import parallel_state  # noqa: E402

from hylo_megatron.distill import command_line  # noqa: E402
from hylo_megatron.engine import step_sync, training_hooks  # noqa: E402
from hylo_megatron.engine.to_host import ToHost  # noqa: E402


def tensors(seed: int = 0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(size, generator=generator) * scale for size, scale in ((1, 3), (1000, 1), (70_001, 1e-3))]


def test_the_norm_is_megatrons_to_the_last_bit():
    from megatron.core.utils import local_multi_tensor_l2_norm

    theirs, _ = local_multi_tensor_l2_norm(65536, None, [tensors()], False)
    ours, _ = step_sync.norm_on_device(None, None)(65536, None, [tensors()], False)
    assert torch.equal(ours, theirs) and ours.shape == (1,)


def test_clipping_on_the_device_has_megatrons_bits(monkeypatch, process_groups):
    from megatron.core.optimizer import clip_grads

    def clipped(scale: float, seed: int) -> tuple[list, object]:
        parameters = [torch.nn.Parameter(torch.zeros_like(tensor)) for tensor in tensors()]
        for parameter, tensor in zip(parameters, tensors(seed), strict=True):
            parameter.grad = tensor * scale
        norm = total_norm([p.grad for p in parameters])
        clip_grads.clip_grad_by_total_norm_fp32(parameters, 1.0, norm)
        return [p.grad for p in parameters], norm

    cases = [(scale, seed) for scale in (0.01, 1.0, 1e4, 1e20, math.nan) for seed in range(20)]
    total_norm = clip_grads.get_grad_norm_fp32
    theirs = [clipped(*case) for case in cases]
    total_norm = step_sync.total_on_device(total_norm, None)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_tensor_impl", step_sync.scale_on_device(None, None))
    for (want, norm), case in zip(theirs, cases, strict=True):
        got, same = clipped(*case)
        assert isinstance(same, torch.Tensor) and same.dtype == torch.float64
        assert same.item() == pytest.approx(norm, rel=1e-15, nan_ok=True)
        assert all(torch.equal(a.view(torch.int32), b.view(torch.int32)) for a, b in zip(got, want, strict=True))


def test_a_rank_whose_gradients_count_elsewhere_clips_by_the_same_bits(monkeypatch, process_groups):
    """Such a rank has copies of other ranks' parameters alone: another factor would make the copies differ."""
    from megatron.core.optimizer import clip_grads

    total_norm = step_sync.total_on_device(clip_grads.get_grad_norm_fp32, None)
    monkeypatch.setattr(clip_grads, "multi_tensor_scale_tensor_impl", step_sync.scale_on_device(None, None))
    others = torch.tensor([3.0])
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda square, **_: square.add_(others))
    here, elsewhere = total_norm([torch.zeros(5)]), total_norm([])
    assert here.dtype == elsewhere.dtype == torch.float64 and torch.equal(here, elsewhere)


@pytest.mark.parametrize("ranks, stages, asked", [(1, 1, False), (2, 1, False), (2, 2, True), (4, 2, True)])
def test_ranks_that_cannot_differ_are_not_asked(ranks, stages, asked, monkeypatch):
    def refuse(*arguments):
        raise AssertionError("asked")

    group = SimpleNamespace(size=lambda: ranks)
    monkeypatch.setattr(parallel_state, "get_pipeline_model_parallel_world_size", lambda: stages)
    both, largest = step_sync.and_of_alike(refuse, None), step_sync.maximum_of_alike(refuse, None)
    for function in (both, largest):
        with pytest.raises(AssertionError, match="asked"):
            function(True)  # megatron's own group
        with pytest.raises(AssertionError, match="asked") if asked else contextlib.nullcontext():
            function(True, group=group)
    if asked:
        return
    assert both(True, group=group) is True and both(False, group=group) is False
    assert largest(None, group=group) is None and largest(0.1, group=group) == torch.tensor(0.1).item()
    norm = largest(torch.tensor([2.5]), group=group)
    assert f"{norm:.3f}" == "2.500"  # megatron's log formats it so


def test_the_scale_of_a_loss_that_is_not_scaled_is_on_the_host():
    scaled = SimpleNamespace(grad_scaler=SimpleNamespace(scale=8.0))
    scale = step_sync.scale_on_host(lambda self: self.grad_scaler.scale, None)
    assert scale(scaled) == 8.0 and scale(SimpleNamespace(grad_scaler=None)).item() == 1.0
    assert scale(SimpleNamespace()).device.type == "cpu"


def test_numbers_come_back_as_they_were():
    values = {"loss": torch.tensor(0.1), "one": torch.tensor([3]), "layers": torch.ones(1, 2), "norm": None, "lr": 0.5}
    expected = {"loss": torch.tensor(0.1).item(), "one": 3, "layers": [[1.0, 1.0]], "norm": None, "lr": 0.5}
    assert ToHost(values).get() == expected


def test_sums_are_those_of_megatrons_log():
    total = {}
    for loss in (0.25, 0.5):
        training_hooks._count(total, {"loss": torch.tensor(loss)}, 0)
    assert total == {"advanced iterations": 2, "skipped iterations": 0, "nan iterations": 0,
                     "loss": torch.tensor([0.75])}  # fmt: skip


@pytest.mark.parametrize("gpu, flags, guard", [
    (True, "", True),
    (True, "--context-parallel-size 2", True),
    (False, "", False),  # nothing waits
    (False, "--hylo-on-spike skip", True),
    (True, "--pipeline-model-parallel-size 2", False),
    (True, "--rerun-mode validate_results", False),
    (True, "--check-for-large-grads", False),
])  # fmt: skip
def test_megatrons_check_is_left_out_where_it_would_wait(monkeypatch, gpu, flags, guard):
    monkeypatch.setattr(command_line, "on_gpu", lambda: gpu)
    assert command_line.guard_checks(command_line.user_flags(flags.split())) is guard


# ---- trainings as on a GPU ----


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.make_world(tmp_path_factory.mktemp("world"))


def log_of(done, folder) -> list[dict]:
    assert done.returncode == 0, done.stderr[-3000:]
    return [{**line, "seconds": None} for line in helpers.read_log(folder / "train_log.jsonl")]


@pytest.mark.parametrize("stage", ["ild", "distill"])
def test_a_log_one_step_behind_has_the_same_lines(world, tmp_path, stage):
    flags = dict(train_iters=5, save_interval=2) | (
        dict(hylo_ce_from=0.5, hylo_ce_weight=0.5) if stage == "distill" else {}
    )
    as_on_gpu = dict(log_interval=3)
    start = helpers.train(*helpers.train_flags(world, stage, tmp_path / "plain", **flags))
    plain = log_of(start, tmp_path / "plain")
    done = helpers.train(
        *helpers.train_flags(world, stage, tmp_path / "ahead", **flags, **as_on_gpu), HYLO_TEST_AHEAD="1"
    )
    ahead = log_of(done, tmp_path / "ahead")
    assert [line["iteration"] for line in ahead] == [1, 2, 3, 4, 5]
    for a, b in zip(plain, ahead, strict=True):
        layers = zip(a.pop("layers", []), b.pop("layers", []), strict=True)
        assert all(pair[0] == pytest.approx(pair[1], abs=2e-5) for pair in layers)
        assert (a.pop("stage"), a.pop("seconds")) == (b.pop("stage"), b.pop("seconds")) == (stage, None)
        assert b == a
    told = [line for line in done.stdout.splitlines() if " iteration " in line and "elapsed time" in line]
    assert len(told) == 2  # the first step, and a mean over three
    if stage == "distill":
        found = float(re.search(r" loss: (\S+) \|", told[1]).group(1))
        assert found == pytest.approx(sum(line["loss"] for line in ahead[:3]) / 3, rel=1e-5)


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.parallel)], ids=["alone", "CP2"])
def test_a_training_that_diverges_ends_before_it_saves(world, tmp_path, ranks):
    """megatron-core's check, which waits in each step, is off: our guard ends the training."""
    flags = dict(train_iters=6, save_interval=3, context_parallel_size=ranks)
    spoiled = dict(HYLO_TEST_AHEAD="1", HYLO_TEST_SPOIL=json.dumps({3: math.nan}))
    done = helpers.train(*helpers.train_flags(world, "distill", tmp_path / "run", **flags), processes=ranks, **spoiled)
    assert done.returncode == 2 and "diverged at step 3: loss nan" in done.stderr
    assert "Result validation enabled" not in done.stdout + done.stderr  # megatron's word for its check
    assert not list((tmp_path / "run").glob("iter_*")) and (tmp_path / "run" / "diverged.json").is_file()
    assert [line["iteration"] for line in helpers.read_log(tmp_path / "run" / "train_log.jsonl")] == [1, 2]
