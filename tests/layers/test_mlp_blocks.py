"""MLPs in blocks of tokens compute what whole MLPs compute, in less memory."""

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers  # noqa: E402
from programs import parity  # noqa: E402
from programs.activation_bytes import alive_in  # noqa: E402

from hylo_megatron.config.decisions import BLOCK_OF_MLP, WHOLE_MLP, mlp_rows  # noqa: E402

pytestmark = pytest.mark.usefixtures("process_groups")
LENGTH, WIDTH = 96, 1024  # of a sequence, of an MLP: sixteen times the model's, so that it is most of the memory
BLOCK = 20  # divides neither a sequence nor two


@pytest.fixture(scope="module")
def pair(tmp_path_factory, process_groups):
    return helpers.write_pair(tmp_path_factory.mktemp("pair"), "gdn", intermediate_size=WIDTH)


@pytest.fixture(scope="module")
def batch() -> dict[str, torch.Tensor]:
    return helpers.token_batch(2, LENGTH)


def build(pair, recompute: int = 0, method: str = "block", dtype=torch.float64, mlp_block: int | None = None):
    config = parity.recomputed(recompute, method)
    return parity.distill_model(*pair, "distill", "all", config=config, dtype=dtype, mlp_block=mlp_block)


def teach(model, batch) -> torch.Tensor:
    with torch.no_grad():
        return model._hidden(model.teacher, batch["tokens"], batch["position_ids"])


def test_the_teacher_in_blocks_is_the_whole_teacher(pair, batch):
    whole = teach(build(pair, dtype=torch.float32), batch)
    got = teach(build(pair, dtype=torch.float32, mlp_block=BLOCK), batch)
    torch.testing.assert_close(got, whole, rtol=1e-6, atol=1e-6)  # products of fewer rows may add in another order
    assert torch.equal(teach(build(pair, dtype=torch.float32, mlp_block=2 * LENGTH), batch), whole)


RECOMPUTED = [(8, "block"), (5, "block"), (1, "uniform"), (2, "uniform"), (3, "uniform"), (8, "uniform")]


@pytest.mark.parametrize("layers, method", RECOMPUTED)
def test_recomputed_blocks_have_the_gradients_of_whole_mlps(layers, method, pair, batch):
    losses, gradients = [], []
    for model in (build(pair), build(pair, layers, method, mlp_block=BLOCK)):
        arrived = []
        for name, parameter in model.named_parameters():
            parameter.register_post_accumulate_grad_hook(lambda _, name=name, arrived=arrived: arrived.append(name))
        losses.append(model(*batch.values()))
        losses[-1][0].backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
        assert sorted(arrived) == sorted(gradients[-1])  # megatron-core counts each gradient once
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-12, atol=0)
    for name, gradient in gradients[0].items():
        assert (gradients[1][name] - gradient).abs().max() <= 1e-11 * gradient.abs().max(), name


def test_an_mlp_whose_values_are_kept_runs_whole(pair, batch):
    seen = []
    model = build(pair, mlp_block=BLOCK)
    model.student.decoder.layers[1].mlp.register_forward_hook(lambda _, args, __: seen.append(len(args[0])))
    model(*batch.values())
    assert seen == [LENGTH]


def peaks(pair, batch, mlp_block: int | None) -> tuple[int, int]:
    """Return bytes at the peak of the teacher's forward pass, and of a step in which all layers are recomputed."""
    model = build(pair, 8, dtype=torch.float32, mlp_block=mlp_block)
    with alive_in(model) as reading:
        teach(model, batch)
    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    with alive_in(model) as step:
        model(*batch.values())[0].backward()
    return reading.most, step.most


def test_the_peak_is_that_of_one_block(pair, batch):
    whole, blocks = peaks(pair, batch, None), peaks(pair, batch, BLOCK)
    tokens = batch["tokens"].numel()
    saved = 4 * (tokens - BLOCK) * 2 * WIDTH  # gate and up of the other blocks
    assert whole[0] - blocks[0] > 0.9 * saved
    assert whole[1] - blocks[1] > 1.5 * saved  # beside them, their gradients


def test_a_deeper_teacher_keeps_no_more(tmp_path, batch):
    most = []
    for layers in (2, 6):
        plan = dict(plan=("mla",) * layers, intermediate_size=WIDTH)
        model = build(helpers.write_pair(tmp_path / str(layers), "gdn", **plan), dtype=torch.float32, mlp_block=BLOCK)
        with alive_in(model) as reading:
            teach(model, batch)
        most.append(reading.most)
    assert most[0] == most[1]


def test_rows_of_a_block():
    wide = 28672  # of an 8B model
    assert mlp_rows(16384, 1, wide) == 16384  # short sequences run whole
    rows = mlp_rows(131072, 1, wide)
    assert rows * wide <= BLOCK_OF_MLP < WHOLE_MLP and rows == 9 * 1024
    assert mlp_rows(131072 // 2, 2, wide) == rows // 2  # two sequences, or two ranks with half of a sequence
    assert mlp_rows(100, 1, wide, block=30) == 30
    assert mlp_rows(100, 4, wide, block=3) == 1  # never less than a row
    assert mlp_rows(100, 1, wide, block=1000) == 100
