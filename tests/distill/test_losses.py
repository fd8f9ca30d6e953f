"""The registry of losses: flags that dataclasses declare, and what another loss has to write."""

import argparse
import weakref
from dataclasses import replace

import pytest
import torch
from helpers import tiny
from helpers.kl import gradients, kl_inputs, reference_hidden_distance, whole_logits
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hylo_megatron.config.stages import STAGE_KINDS, stage_kind
from hylo_megatron.distill import kl_fused
from hylo_megatron.distill.head import Shard, token_weights
from hylo_megatron.distill.losses import JSD, KL, LOSSES, HeadShape, LayerDistance, ReverseKL, loss_class, loss_of
from hylo_megatron.distill.losses.hidden import hidden_distance, shared_gradient
from hylo_megatron.errors import HyLoError
from hylo_megatron.options import add_options, from_options

# Flags and defaults that command lines and checkpoints of earlier versions have.
DEFAULTS = {
    "kl": dict(
        hylo_kl_weight=1.0, hylo_ce_weight=0.0, hylo_temperature=1.0, hylo_reverse_kl=False, hylo_kl_chunk=1024,
        hylo_teacher_length=None, hylo_ce_beyond_teacher=1.0, hylo_ce_from=0.0, hylo_hidden_weight=0.0,
        hylo_hidden_layers_weight=0.0,
    ),
    "ild": dict(hylo_ild_raw_norms=False, hylo_ild_attention_weight=1.0, hylo_ild_hidden_weight=1.0),
}  # fmt: skip


def parse(words: list[str], *losses: type) -> argparse.Namespace:
    parser = argparse.ArgumentParser()
    for loss in losses:
        add_options(parser, loss)
    return parser.parse_args(words)


@pytest.mark.parametrize("name", LOSSES)
def test_flags_and_their_defaults(name):
    found = vars(parse([], LOSSES[name]))
    assert DEFAULTS.get(name, found) == found
    assert from_options(LOSSES[name], argparse.Namespace(**found)) == LOSSES[name]()


def test_flags_set_fields():
    words = ["--hylo-kl-weight", "0.5", "--hylo-reverse-kl", "--hylo-teacher-length", "40", "--hylo-ild-raw-norms"]
    given = parse(words, *LOSSES.values())
    assert from_options(KL, given) == KL(kl_weight=0.5, reverse=True, teacher_length=40)
    assert from_options(LayerDistance, given) == LayerDistance(raw_norms=True)


def test_every_kind_of_stage_has_a_loss_that_fits():
    for kind in STAGE_KINDS.values():
        assert isinstance(loss_of(kind, argparse.Namespace(hylo_loss=None)), LOSSES[kind.loss])


def test_a_loss_of_another_kind_of_stage_is_refused():
    with pytest.raises(HyLoError, match="--hylo-loss kl does not fit --hylo-stage ild: expected ild"):
        loss_class(stage_kind("ild"), "kl")


CHOICES = {
    "reverse-kl": ReverseKL(kl_weight=0.8, ce_weight=0.2, chunk=7, teacher_length=21),
    "jsd": JSD(kl_weight=0.8, ce_weight=0.2, chunk=7, teacher_length=21),
    "jsd, beta 0.1": JSD(beta=0.1, chunk=7),
    "jsd, tempered": JSD(beta=0.7, temperature=2.0, ce_weight=0.2, chunk=16),
}


@pytest.mark.parametrize("loss", CHOICES.values(), ids=CHOICES)
def test_another_divergence_equals_whole_logits(loss, monkeypatch):
    monkeypatch.setattr(kl_fused, "fits", lambda _: True)  # the KL's kernels must not be taken
    assert loss.fused_chunk(torch.zeros(1)) is None
    x = kl_inputs(32, loss)
    got, want = loss(x), whole_logits(x, loss)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-5)
    for found, expected in zip(
        gradients(got[0], x.h_TD, x.head_ND), gradients(want[0], x.h_TD, x.head_ND), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", [KL(temperature=2.0), *CHOICES.values()], ids=["kl, tempered", *CHOICES])
def test_no_value_reaches_the_host(loss):
    """A CUDA graph captures the loss. Tensors without values refuse what it refuses: shapes that depend on values."""
    x = kl_inputs(32, loss)
    empty = {name: value.to("meta") for name, value in vars(x).items() if isinstance(value, torch.Tensor)}
    sums = loss(replace(x, **empty))
    assert sums.is_meta and sums.shape == (3,)


class Peak(TorchDispatchMode):
    """Bytes of the storages that operations have made and that are alive, and their largest number."""

    def __init__(self):
        super().__init__()
        self.live, self.peak = {}, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in tree_leaves(out):
            if isinstance(x, torch.Tensor) and (storage := x.untyped_storage())._cdata not in self.live:
                self.live[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.live.pop, storage._cdata)
        self.peak = max(self.peak, sum(self.live.values()))
        return out


@pytest.mark.parametrize(
    "loss", [KL(chunk=64, temperature=2.0), ReverseKL(chunk=64), JSD(chunk=64)], ids=["kl", "r", "j"]
)
def test_the_planner_knows_the_memory_without_kernels(loss):
    x = kl_inputs(192, loss, rows=3000, vocab=3000, width=8, teacher_width=8)
    half = {name: getattr(x, name).detach().bfloat16() for name in ("h_TD", "head_ND", "t_TC", "teacher_head_NC")}
    half["head_ND"].requires_grad_()
    with Peak() as seen:
        loss(replace(x, **half))
    planned = loss.memory(HeadShape(tokens=192, taught=192, rows=3000, width=8, teacher_width=8))
    assert 0.75 * planned < seen.peak <= planned


def test_what_the_choices_mean():
    assert ReverseKL() != KL()
    x = kl_inputs(32)
    torch.testing.assert_close(ReverseKL()(x), KL(reverse=True)(x))
    x = replace(x, h_TD=0.2 * x.h_TD, t_TC=0.2 * x.t_TC)
    for beta, limit in ((1e-3, KL()), (1 - 1e-3, ReverseKL())):  # the divergence over beta (1 - beta) has both limits
        found = JSD(beta=beta)(x)[1] / (beta * (1 - beta))
        torch.testing.assert_close(found, limit(x)[1], rtol=1e-2, atol=0)
    p, q = torch.tensor([[0.5, 0.5, 0.0]]), torch.tensor([[0.25, 0.25, 0.5]])
    m = 0.3 * p + 0.7 * q
    by_hand = 0.3 * (p * (p / m).log()).nan_to_num().sum() + 0.7 * (q * (q / m).log()).sum()
    found = JSD(beta=0.3).divergence(q.log(), p.log(), Shard(3, 3, None))[0]
    torch.testing.assert_close(found, by_hand[None])


@pytest.mark.parametrize("words, said", [
    (["--hylo-jsd-beta", "1"], "--hylo-jsd-beta 1.0: expected a number between 0 and 1"),
    (["--hylo-reverse-kl"], "--hylo-reverse-kl does not apply to --hylo-loss jsd"),
])  # fmt: skip
def test_settings_that_a_divergence_does_not_have_are_refused(words, said):
    with pytest.raises(HyLoError, match=said):
        from_options(JSD, parse(words, *LOSSES.values()))


# ---- weights that change within a stage ----


def test_cross_entropy_comes_late():
    loss = KL(kl_weight=0.5, ce_weight=0.5, ce_from=2 / 3, teacher_length=21, ce_beyond=0.6)
    assert [step for step in range(960) if loss.late_at(step, 960)] == list(range(640, 960))
    assert KL().late_at(0, 4) and not KL(ce_from=1.0).late_at(3, 4)
    x = kl_inputs(32, loss)
    for late, plain in ((0.0, replace(loss, kl_weight=1.0, ce_weight=0.0)), (1.0, loss)):
        now = replace(x, late=torch.tensor(late))
        torch.testing.assert_close(loss(now), plain(x), rtol=0, atol=0)
        got, want = token_weights(now, loss), token_weights(x, plain)
        assert torch.equal(got.ce_T, want.ce_T) and torch.equal(got.kl_T, want.kl_T)
    first = KL(kl_weight=0.0, ce_weight=1.0, ce_from=0.5)  # only a divergence, then only cross-entropy
    early, late = (first(replace(kl_inputs(32), late=torch.tensor(value))) for value in (0.0, 1.0))
    torch.testing.assert_close(early, KL()(kl_inputs(32)))
    torch.testing.assert_close(late[0], KL(kl_weight=0.0, ce_weight=1.0)(kl_inputs(32))[0])


# ---- hidden states ----


@pytest.mark.parametrize("taught", [9, 5])
def test_hidden_distance_equals_a_loop_over_tokens(taught):
    student, teacher = torch.randn(9, 2, 6, requires_grad=True), torch.randn(taught, 2, 6)
    mask = (torch.rand(9, 2) > 0.3).float()
    got, want = hidden_distance(student, teacher, mask), reference_hidden_distance(student, teacher, mask)
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(torch.autograd.grad(got, student), torch.autograd.grad(want, student))


def test_a_gradient_that_ranks_share():
    x = torch.tensor(3.0, requires_grad=True)
    value = shared_gradient(x * x, 4)
    assert value == 9 and torch.autograd.grad(value, x)[0] == 1.5


def test_distances_are_parts_of_the_loss():
    assert KL(hidden_weight=0.5).parts == ("loss", "kl", "ce", "hidden")
    assert JSD(hidden_weight=0.5, hidden_layers_weight=0.1).parts[3:] == ("hidden", "hidden layers")
    counts = KL(hidden_weight=1.0, teacher_length=3).token_counts(torch.ones(2, 5), torch.arange(5).expand(2, 5))
    assert {name: int(count) for name, count in counts.items()} == dict(loss=10, kl=6, ce=10, hidden=6)


@pytest.mark.parametrize("loss, changes, said", [
    (KL(hidden_weight=1.0), dict(hidden_size=48), "--hylo-hidden-weight: student and teacher are 64 and 48 wide"),
    (KL(hidden_layers_weight=1.0), dict(plan=("attention",) * 6), "student and teacher have 4 and 6 layers"),
])  # fmt: skip
def test_models_that_differ_have_no_hidden_distance(loss, changes, said):
    student = tiny.hybrid()
    teacher = replace(student.as_teacher(), mla_qk_norm=False)
    loss.check(student, teacher, 1, False)
    with pytest.raises(HyLoError, match=said):
        loss.check(student, replace(teacher, **changes), 1, False)
    for pp, recompute in ((2, False), (1, True)):
        with pytest.raises(HyLoError, match="neither pipeline stages nor recompute"):
            KL(hidden_layers_weight=1.0).check(student, teacher, pp, recompute)
