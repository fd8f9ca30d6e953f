"""Initial states of linear blocks: a text in two steps with carried states is one text, and gradients stop there."""

import contextlib
from types import SimpleNamespace

import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)

from helpers import train as helpers  # noqa: E402

from hylo_megatron.config import Architecture  # noqa: E402
from hylo_megatron.config.stages import stage_kind  # noqa: E402
from hylo_megatron.distill.losses import KL  # noqa: E402
from hylo_megatron.distill.model import DistillModel  # noqa: E402
from hylo_megatron.distill.settings import DistillSettings  # noqa: E402
from hylo_megatron.engine.training_hooks import with_step_start  # noqa: E402
from hylo_megatron.engine.training_run import TrainingRun  # noqa: E402
from hylo_megatron.kernels import ops_for  # noqa: E402
from hylo_megatron.layers.load import layout_config, load_model  # noqa: E402
from hylo_megatron.mixers import LINEAR  # noqa: E402
from hylo_megatron.mixers.initial_states import InitialStates  # noqa: E402
from hylo_megatron.mixers.megatron_linear import LinearMixer  # noqa: E402

B, S, H, K = 2, 64, 3, 8


@pytest.fixture(scope="module", params=LINEAR)
def pair(request, tmp_path_factory, process_groups):
    return helpers.write_pair(tmp_path_factory.mktemp(request.param), request.param)


def model_of(pair, mode: str, chunk: int | None = None, **config) -> DistillModel:
    archs = [Architecture.load(folder) for folder in pair]
    models = [
        load_model(folder, layout_config(arch, **config), vp_stage=chunk)[0]
        for folder, arch in zip(pair, archs, strict=True)
    ]
    settings = DistillSettings(kind=stage_kind("distill"), train="all", loss=KL(), initial_states=mode)
    return DistillModel(*models, *archs, settings).train()


def blocks(model) -> list[LinearMixer]:
    return [module for module in model.student.modules() if isinstance(module, LinearMixer)]


def test_carried_states_continue_a_text():
    torch.manual_seed(0)
    q, k, v = (torch.randn(B, 2 * S, H, K) for _ in range(3))
    g, beta = -torch.rand(B, 2 * S, H), torch.rand(B, 2 * S, H)
    whole, _ = ops_for(q).chunk_gated_delta_rule(q, k, v, g=g, beta=beta, use_qk_l2norm_in_kernel=True)
    states = InitialStates("carried", ("chunk_gated_delta_rule",), 1)
    for half in (slice(0, S), slice(S, None)):
        states.begin_step(0)
        own = [x[:, half].requires_grad_() for x in (q, k, v)]
        out, _ = states.kernels(q).chunk_gated_delta_rule(
            *own, g=g[:, half], beta=beta[:, half], use_qk_l2norm_in_kernel=True
        )
        torch.testing.assert_close(out, whole[:, half], rtol=1e-4, atol=1e-5)
    assert not states.initial.requires_grad


def test_noise_has_the_mean_and_deviation_of_the_states():
    states = InitialStates("random", (), 7)
    states.final = torch.randn(400, 2, 8, 8) * torch.tensor([2.0, 0.5])[:, None, None] + 1
    states.begin_step(3)
    first = states.initial.clone()
    torch.testing.assert_close(first.std((0, 2, 3)), torch.tensor([2.0, 0.5]), rtol=0.03, atol=0)
    torch.testing.assert_close(first.mean((0, 2, 3)), torch.ones(2), rtol=0.1, atol=0)
    states.begin_step(3)
    assert torch.equal(states.initial, first)  # a resumed run draws the same
    states.begin_step(4)
    assert not torch.equal(states.initial, first)


@pytest.mark.parametrize("mode", ["carried", "random"])
@pytest.mark.parametrize("wrong", [torch.nan, torch.inf, 1e30])
def test_wrong_states_are_not_carried(mode, wrong):
    states = InitialStates(mode, (), 7)
    states.final = torch.randn(2, H, K, K)
    states.begin_step(0)
    place, states.final[1, 0, 0, 0] = states.initial.data_ptr(), wrong
    if wrong == 1e30:  # only the guard knows
        states.forget()
    states.begin_step(1)
    assert not states.initial.any() and states.initial.data_ptr() == place  # a CUDA graph reads there
    states.final.normal_()
    states.begin_step(2)
    assert states.initial.any() and states.initial.isfinite().all()


def test_restored_states_are_written_where_a_graph_reads_them():
    states, saved = InitialStates("carried", (), 7), torch.randn(2, H, K, K)
    states.restore(saved)
    place = states.final.data_ptr()
    assert place != saved.data_ptr() and torch.equal(states.final, saved)
    states.restore(2 * saved)  # a rollback, in the midst of a training
    assert states.final.data_ptr() == place and torch.equal(states.final, 2 * saved)


@pytest.mark.parametrize("wrong", [None, "loss nan"])
def test_a_step_that_the_guard_leaves_out_is_forgotten(pair, wrong, monkeypatch):
    model, x = model_of(pair, "carried"), helpers.token_batch(2, 64)
    guard = SimpleNamespace(
        phase=None, begin=lambda _: None, gate=lambda _: contextlib.nullcontext([]), after=lambda *_: None, wrong=wrong
    )
    args = SimpleNamespace(train_iters=4, hylo_offload_optimizer=False)
    monkeypatch.setattr("megatron.training.get_args", lambda: args)

    def train_step(*_, **__):
        return model(*x.values()), 0, False, False, 0

    step = with_step_start(train_step, TrainingRun(models=[model], guard=guard))
    first, second = (step(*[None] * 7, iteration=iteration)[0] for iteration in range(2))
    assert torch.allclose(second, first, rtol=1e-6) == (wrong is not None)


def test_model_chunks_of_a_rank_draw_different_noise(pair):
    models = [model_of(pair, "random", chunk, virtual_pipeline_model_parallel_size=2) for chunk in range(2)]
    seeds = [states.seed for model in models for states in model._initial_states.values()]
    assert len(set(seeds)) == len(seeds) > 1


@pytest.mark.parametrize("mode", ["zero", "carried", "random"])
def test_only_training_after_the_first_step_starts_elsewhere(pair, mode):
    model, plain, x = model_of(pair, mode), model_of(pair, "zero"), helpers.token_batch(2, 64)
    want = plain(*x.values()).detach()
    model.begin_step(0, 4)
    torch.testing.assert_close(model(*x.values()), want, rtol=1e-5, atol=1e-5)
    model.begin_step(1, 4)
    second = model(*x.values())
    assert torch.allclose(second, want, rtol=1e-6) == (mode == "zero")
    second[0].backward()  # no graph of the first step is needed
    model.eval()
    torch.testing.assert_close(model(*x.values()), want, rtol=1e-5, atol=1e-5)
    assert bool(model._initial_states) == (mode != "zero")


def test_recomputed_layers_start_from_the_same_states(pair):
    x, found = helpers.token_batch(2, 64), []
    again = dict(recompute_granularity="full", recompute_method="block", recompute_num_layers=100)
    for config in ({}, again):
        model = model_of(pair, "carried", **config)
        for step in range(2):
            model.zero_grad()
            model.begin_step(step, 4)
            model(*x.values())[0].backward()
        found.append([parameter.grad for parameter in model.student.parameters()])
    for plain, recomputed in zip(*found, strict=True):
        torch.testing.assert_close(recomputed, plain, rtol=1e-5, atol=1e-8)
