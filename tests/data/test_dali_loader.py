"""``--dataloader dali``: the samples and the order of the default loader, from any point.

Every test has a stand-in of DALI, and DALI itself where it is installed.
"""

import itertools
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hylo_megatron import packages

if not packages.has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from hylo_megatron.engine.register import install  # noqa: E402

install("megatron")
from hylo_megatron.data.dali_loader import DEPTH, DaliLoader  # noqa: E402
from hylo_megatron.distill import batches  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402

SAMPLES, LENGTH, ROWS = 37, 6, 3


class StandIn:
    """What ``DaliLoader`` uses of DALI, with its order of calls: the source is asked ahead of ``run``."""

    class Pipeline:
        def __init__(self, rows, num_threads, device_id, prefetch_queue_depth):
            self.depth, self.ready = prefetch_queue_depth, []

        def __enter__(self):
            StandIn.current = self

        def __exit__(self, *_):
            pass

        def set_outputs(self, *parts):
            self.number = len(parts)

        def build(self):
            self.ended = False

        def run(self):
            while not self.ended and len(self.ready) < self.depth:
                try:
                    self.ready.append([array.copy() for array in self.source()])
                except StopIteration:
                    self.ended = True
            if not self.ready:
                raise StopIteration
            arrays = self.ready.pop(0)
            assert len(arrays) == self.number
            return [SimpleNamespace(as_tensor=lambda a=a: SimpleNamespace(shape=lambda: a.shape, a=a)) for a in arrays]

    @staticmethod
    def external_source(source, num_outputs, batch):
        StandIn.current.source = source
        return [None] * num_outputs

    @staticmethod
    def feed_ndarray(found, out, cuda_stream):
        out.copy_(torch.from_numpy(found.a))


@pytest.fixture(params=["stand-in", "real"])
def dali(request, monkeypatch):
    if request.param == "stand-in":
        monkeypatch.setattr(packages, "load", lambda *_: StandIn)
        monkeypatch.setattr(packages, "require", lambda *_: None)
    elif not packages.has("nvidia-dali"):
        pytest.skip("NVIDIA DALI is not installed")


class Data(torch.utils.data.Dataset):
    """Random samples like those of ``PackedDataset``; sample ``broken`` cannot be read."""

    def __init__(self, broken: int | None = None):
        self.ids = np.random.default_rng(0).integers(0, 1000, (SAMPLES, LENGTH + 1))
        self.broken = broken

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        if index == self.broken:
            raise HyLoError("tokens: damaged")
        ids = torch.from_numpy(self.ids[index])
        return {"tokens": ids[:-1], "labels": ids[1:], "loss_mask": (ids[1:] % 3 > 0).float()}


def arguments(consumed: int = 0, **changes) -> SimpleNamespace:
    values = dict(
        dataloader="dali", dataloader_type="single", consumed_train_samples=consumed, consumed_valid_samples=0,
        micro_batch_size=ROWS, full_validation=False, hybrid_context_parallel=False, phase_transition_iterations=None,
    )  # fmt: skip
    return SimpleNamespace(**(values | changes))


@pytest.mark.parametrize("rank, size", [(0, 1), (1, 2)])
@pytest.mark.parametrize("consumed", [0, 12])
def test_samples_and_order_are_those_of_the_default_loader(dali, monkeypatch, rank, size, consumed):
    from megatron.training.datasets.data_samplers import MegatronPretrainingSampler

    group = SimpleNamespace(rank=lambda: rank, size=lambda: size)
    monkeypatch.setattr(batches.parallel_state, "get_data_parallel_group", lambda: group)
    sampler = MegatronPretrainingSampler(SAMPLES, consumed, ROWS, rank, size)
    expected = list(torch.utils.data.DataLoader(Data(), batch_sampler=sampler))
    loader, *others = batches.dali_loaders(arguments(consumed), [Data(), None, None])
    assert isinstance(loader.reads, Data)  # of which the guard names samples
    found = list(loader)
    assert others == [None, None] and len(found) == len(expected) > 2 * DEPTH - 3 * size
    for got, want in zip(found, expected, strict=True):
        assert got.keys() == want.keys()
        assert all(torch.equal(got[key], want[key]) and got[key].dtype == want[key].dtype for key in want)


def test_an_error_of_the_data_set_reaches_the_training(dali):
    loader = DaliLoader(Data(broken=20), [[number] for number in range(SAMPLES)], batches.KEYS, 1, None)
    with pytest.raises(HyLoError, match="tokens: damaged"):
        list(loader)


def test_a_batch_stays_while_others_are_read(dali):
    loader = DaliLoader(Data(), [[number] for number in range(SAMPLES)], batches.KEYS, 1, None)
    first = next(loader)
    kept = first["tokens"].clone()
    for _ in itertools.islice(loader, 8):
        pass
    assert torch.equal(first["tokens"], kept)


def test_flags_that_do_not_go_together_and_a_missing_package(monkeypatch):
    with pytest.raises(HyLoError, match="--full-validation: not with --dataloader dali"):
        batches.check_dataloader(arguments(full_validation=True))
    missing = packages.Capability("nvidia-dali", False, None, "a loader")
    monkeypatch.setattr(packages, "capabilities", lambda: {"nvidia-dali": missing})
    with pytest.raises(HyLoError, match="--dataloader dali needs nvidia-dali.*pip install nvidia-dali-cuda130"):
        batches.check_dataloader(arguments())
    batches.check_dataloader(arguments(dataloader="torch"))


def test_the_trainer_takes_its_loader_as_it_is(dali):
    given = arguments()
    batches.check_dataloader(given)
    assert given.dataloader_type == "external"
    assert "nvidia.dali" not in sys.modules or packages.has("nvidia-dali")


@pytest.mark.slow
@pytest.mark.skipif(not packages.has("nvidia-dali"), reason="NVIDIA DALI is not installed")
def test_a_training_that_goes_on_has_the_losses_of_the_default_loader(tmp_path):
    from helpers import train as helpers

    world = helpers.random_world(tmp_path)

    def losses(name: str, **flags) -> dict[int, float]:
        argv = helpers.train_flags(world, "distill", tmp_path / name, save_interval=2, **flags)
        done = helpers.train(*argv)
        assert done.returncode == 0, done.stderr[-3000:]
        lines = helpers.read_log(tmp_path / name / "train_log.jsonl")
        return {line["iteration"]: line["loss"] for line in lines}

    expected = losses("torch")
    assert losses("dali", dataloader="dali") == expected and len(expected) == 4
    resumed = losses("resumed", dataloader="dali", load=tmp_path / "dali", ckpt_step=2)
    assert {step: loss for step, loss in expected.items() if step > 2}.items() <= resumed.items()
