"""A teacher and an optimizer that wait in the host's memory train the same student, bit for bit."""

import contextlib

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers  # noqa: E402
from programs import parity  # noqa: E402

from hylo_megatron.distill.host_memory import Away, OptimizerAway, optimizer_tensors, stream_layers  # noqa: E402

pytestmark = pytest.mark.usefixtures("process_groups")


@pytest.fixture(scope="module")
def pair(tmp_path_factory, process_groups):
    return helpers.write_pair(tmp_path_factory.mktemp("pair"), "gdn", tie_word_embeddings=False)


def present(module) -> bool:
    return all(weight.untyped_storage().nbytes() for weight in module.parameters())


def test_layers_are_there_one_at_a_time_and_compute_the_same(pair):
    batch = helpers.token_batch(2, 32)
    model = parity.distill_model(*pair, "distill", "all")
    want = model(*batch.values())
    seen, teacher = [], model.teacher
    stream_layers(teacher)
    modules = [teacher.embedding, *teacher.decoder.layers]
    for module in modules:
        module.register_forward_pre_hook(lambda *_: seen.append(sum(map(present, modules))))
    for _ in range(2):
        assert torch.equal(model(*batch.values()), want)
    assert seen == [1] * 2 * len(modules) and not any(map(present, modules))
    assert present(teacher.output_layer) and present(teacher.decoder.final_norm)


def test_a_layer_that_is_trained_stays(pair):
    with pytest.raises(ValueError, match="is trained"):
        stream_layers(parity.distill_model(*pair, "distill", "all").student)


def cell(pair, dtype: str = "fp32") -> parity.Cell:
    sizes = dict(steps=1, adam=True, distributed_optimizer=True, dtype=dtype)
    return parity.Cell("", *map(str, pair), "distill", "all", **sizes)


def steps(pair, dtype: str, away: OptimizerAway | None, count: int = 3) -> dict[str, torch.Tensor]:
    model, wrapped, optimizer = parity.build(cell(pair, dtype))
    batch = helpers.token_batch(2, 32)
    for _ in range(count):
        wrapped.zero_grad_buffer()
        with away.during_passes(optimizer) if away else contextlib.nullcontext():
            if away:
                assert not any(t.untyped_storage().nbytes() for t in optimizer_tensors(optimizer) if is_own(t))
            model(*batch.values())[0].backward()
            wrapped.finish_grad_sync()
            optimizer.step()
        assert all(t.untyped_storage().nbytes() for t in optimizer_tensors(optimizer))
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def is_own(tensor: torch.Tensor) -> bool:
    return tensor.untyped_storage().nbytes() in (0, tensor.nbytes)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_steps_are_the_same_bit_for_bit(dtype, pair):
    want, away = steps(pair, dtype, None), OptimizerAway()
    got = steps(pair, dtype, away)
    assert away.away.copies
    for name, parameter in want.items():
        assert torch.equal(got[name], parameter), name


def test_states_come_back_after_a_step_that_was_left_out(pair):
    optimizer, away = parity.build(cell(pair))[2], OptimizerAway()
    before = [tensor.clone() for tensor in optimizer_tensors(optimizer)]
    with pytest.raises(KeyError), away.during_passes(optimizer):
        raise KeyError
    assert "step" not in vars(optimizer)
    for tensor, value in zip(optimizer_tensors(optimizer), before, strict=True):
        assert torch.equal(tensor, value)


def test_a_view_stays_and_old_copies_are_forgotten():
    whole, away = torch.arange(8.0), Away(constant=False)
    away.put([whole[:4]])
    assert whole[:4].tolist() == [0, 1, 2, 3]
    away.put([whole])
    away.take([whole])
    assert whole.tolist() == list(range(8))
    away.forget_all_but([])
    assert not away.copies
