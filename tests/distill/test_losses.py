"""The registry of losses: flags that dataclasses declare, and what another loss has to write."""

import argparse
from dataclasses import dataclass, fields

import pytest
import torch
from helpers.kl import gradients, kl_inputs, whole_logits

from hylo_megatron.config.stages import STAGE_KINDS, stage_kind
from hylo_megatron.distill import kl_fused
from hylo_megatron.distill.losses import KL, LOSSES, LayerDistance, loss_class, loss_of
from hylo_megatron.errors import HyLoError
from hylo_megatron.options import add_options, from_options

# Flags and defaults that command lines and checkpoints of earlier versions have.
DEFAULTS = {
    "kl": dict(
        hylo_kl_weight=1.0, hylo_ce_weight=0.0, hylo_temperature=1.0, hylo_reverse_kl=False, hylo_kl_chunk=1024,
        hylo_teacher_length=None, hylo_ce_beyond_teacher=1.0,
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


@dataclass(frozen=True, kw_only=True)
class Midpoint(KL):
    """What another divergence has to write: KL of the teacher from the mean of both distributions."""

    parts = ("loss", "midpoint", "ce")

    def divergence(self, log_s, log_t, shard):
        p_s, p_t = log_s.exp(), log_t.exp()
        middle = (p_s + p_t) / 2
        value = shard.sum((p_t * (log_t - middle.log()).nan_to_num_(0.0)).sum(-1))
        by_p = -(p_t / middle / 2).nan_to_num_(0.0)
        return value, p_s * (by_p - shard.sum((p_s * by_p).sum(-1, keepdim=True)))

    def reference_divergence(self, log_s, log_t):
        return (log_t.exp() * (log_t - ((log_s.exp() + log_t.exp()) / 2).log())).sum(-1)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_another_divergence_is_chunked_like_the_first(temperature, monkeypatch):
    monkeypatch.setattr(kl_fused, "fits", lambda *_: True)  # kernels of the KL must not be taken for this one
    loss = Midpoint(kl_weight=0.8, ce_weight=0.2, temperature=temperature, chunk=7, teacher_length=21)
    assert {field.name for field in fields(loss)} == {field.name for field in fields(KL)}
    x = kl_inputs(32, loss)
    got, want = loss(x), whole_logits(x, loss)
    torch.testing.assert_close(got, want, rtol=2e-6, atol=1e-5)
    for found, expected in zip(
        gradients(got[0], x.h_TD, x.head_ND), gradients(want[0], x.h_TD, x.head_ND), strict=True
    ):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
