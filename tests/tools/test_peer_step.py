"""``tools/bench/transformers_step.py``: the peer of a training step computes the loss that the trainer computes."""

import pytest
import torch
from helpers.paths import ROOT

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers  # noqa: E402

from hylo_megatron.config import Architecture  # noqa: E402
from hylo_megatron.config.stages import stage_kind  # noqa: E402
from hylo_megatron.distill.losses import KL  # noqa: E402
from hylo_megatron.distill.model import DistillModel  # noqa: E402
from hylo_megatron.distill.settings import DistillSettings  # noqa: E402
from hylo_megatron.layers.load import layout_config, load_model  # noqa: E402

CPU, FP32 = torch.device("cpu"), torch.float32


@pytest.fixture
def peer(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tools" / "bench")
    import transformers_step

    return transformers_step


@pytest.fixture(scope="module", params=("gdn", "mamba2"))
def pair(request, tmp_path_factory, process_groups):
    return helpers.write_pair(tmp_path_factory.mktemp(request.param), request.param)


def models_of(peer, pair) -> list[torch.nn.Module]:
    archs = [Architecture.load(folder) for folder in pair]
    return [peer.load(peer.transformers_model(arch, CPU, FP32), folder, FP32)
            for arch, folder in zip(archs, pair, strict=True)]  # fmt: skip


def test_the_loss_is_the_trainers(peer, pair):
    archs = [Architecture.load(folder) for folder in pair]
    models = [load_model(folder, layout_config(arch))[0] for folder, arch in zip(pair, archs, strict=True)]
    settings = DistillSettings(kind=stage_kind("distill"), train="all", loss=KL(chunk=50))
    batch = helpers.token_batch(2, helpers.SEQ)
    tokens = batch["tokens"]
    ours = DistillModel(*models, *archs, settings)(
        tokens, batch["position_ids"], batch["labels"], torch.ones(2, helpers.SEQ)
    )
    theirs = peer.divergence(*models_of(peer, pair), tokens)
    assert theirs.item() > 1e-3
    assert theirs.item() == pytest.approx(ours[0].item() / tokens.numel(), rel=1e-4)


def test_steps_of_the_peer_learn(peer, pair):
    student, teacher = models_of(peer, pair)
    student.train().gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    teacher.eval().requires_grad_(False)
    step = peer.stepper(
        student, teacher, peer.parsed(["--student", "x", "--teacher", "y", "--seq-length", "64", "--lr", "1e-3"])
    )
    batch = helpers.token_batch(2, helpers.SEQ)["tokens"]
    losses = [step(batch).item() for _ in range(6)]
    assert losses == sorted(losses, reverse=True) and losses[-1] < 0.9 * losses[0]


def test_the_fastest_batch_is_found(peer):
    speeds = {1: 10.0, 2: 14.0, 4: 12.0}
    found = peer.fastest(lambda batch: {"tokens_per_second": speeds[batch]} if batch in speeds else None)
    assert found == {"tokens_per_second": 14.0} and peer.fastest(lambda batch: None) is None
