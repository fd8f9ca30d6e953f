"""Levers of a recipe as flags of one training: what its log says of them."""

import pytest

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from helpers import train as helpers  # noqa: E402


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    return helpers.make_world(tmp_path_factory.mktemp("world"))


def test_flags_for_several_stages_reach_those_that_they_fit():
    from hylo_megatron.config.stages import stage_kind
    from hylo_megatron.distill.losses import fitting

    flags = ["--seed", 3, "--hylo-kl-chunk", 64, "--hylo-reverse-kl", "--hylo-jsd-beta=0.3", "--hylo-ild-raw-norms"]
    assert fitting(flags, stage_kind("ild")) == ["--seed", "3", "--hylo-ild-raw-norms"]
    kl = ["--seed", "3", "--hylo-kl-chunk", "64", "--hylo-reverse-kl"]
    assert fitting(flags, stage_kind("distill")) == kl
    assert fitting(flags, stage_kind("distill"), "jsd") == [*kl, "--hylo-jsd-beta=0.3"]
    assert fitting(["--hylo-answer-weight", "0.1"], stage_kind("ild")) == []


def test_a_training_with_every_lever(world, tmp_path):
    flags = dict(hylo_loss="jsd", hylo_kl_weight=0.6, hylo_ce_weight=0.3, hylo_ce_from=0.5, hylo_hidden_weight=2.0,
                 hylo_hidden_layers_weight=0.1, hylo_initial_states="carried", hylo_on_spike="skip")  # fmt: skip
    done = helpers.train(*helpers.train_flags(world, "distill", tmp_path, **flags))
    assert done.returncode == 0, done.stderr[-3000:]
    lines = helpers.read_log(tmp_path / "train_log.jsonl")
    assert len(lines) == 4
    for line in lines:
        kl, ce = (0.6, 0.3) if line["iteration"] > 2 else (0.9, 0.0)
        hidden = 2.0 * line["hidden"] + 0.1 * line["hidden layers"]
        assert line["loss"] == pytest.approx(kl * line["jsd"] + ce * line["ce"] + hidden, rel=1e-5)


@pytest.mark.parametrize("flags, words", [
    (dict(context_parallel_size=2, hylo_initial_states="random"), "random: a sequence must be on one rank"),
    (dict(check_for_spiky_loss=True), "--check-for-spiky-loss has no effect here"),
    (dict(hylo_loss="jsd", hylo_jsd_beta=0), "--hylo-jsd-beta 0.0: expected a number between 0 and 1"),
    (dict(hylo_ce_from=0.5), "--hylo-ce-from 0.5 has no effect: --hylo-ce-weight is 0"),
    (dict(hylo_jsd_beta=0.3), "--hylo-jsd-beta 0.3 has no effect: --hylo-stage distill has the loss kl"),
    (dict(stage="ild", hylo_hidden_weight=1), "--hylo-hidden-weight 1.0 has no effect: .* ild has the loss ild"),
    (dict(stage="ild", hylo_ce_from=0.5), "--hylo-ce-from 0.5 has no effect: .* has the loss ild"),
    (dict(stage="ild", hylo_temperature=2), "--hylo-temperature 2.0 has no effect: --hylo-stage ild has the loss ild"),
    (dict(stage="ild", hylo_kl_weight=1), "--hylo-kl-weight 1.0 has no effect"),  # given, though at its default
    (dict(stage="ild", hylo_reverse_kl=True), "--hylo-reverse-kl has no effect: --hylo-stage ild"),
    (dict(stage="ild", hylo_answer_weight=0.1), "--hylo-answer-weight 0.1 has no effect: --hylo-stage ild"),
    (dict(hylo_ild_raw_norms=True), "--hylo-ild-raw-norms has no effect: --hylo-stage distill has the loss kl"),
    (dict(hylo_ce_beyond_teacher=0.5), "--hylo-ce-beyond-teacher has no effect: --hylo-teacher-length is not given"),
    (dict(hylo_spike_factor=1), "--hylo-spike-factor 1.0: expected a number above 1"),
    (dict(hylo_burst_factor=1), "--hylo-burst-factor 1.0: expected a number above 1"),
    (dict(hylo_on_spike="rollback", no_save_optim=True), "rollback needs the optimizer"),
    (dict(hylo_on_spike="rollback", save=""), "rollback: --save is missing"),
    (dict(hylo_offload_teacher=True, cuda_graph_impl="full_iteration"), "-teacher: --cuda-graph-impl full_iteration"),
    (dict(hylo_recurrence_block=100), "--hylo-recurrence-block 100: expected a multiple of 64"),
    (dict(hylo_recurrence_block=64, hylo_initial_states="carried"), "64 works with --hylo-initial-states zero"),
    (dict(stage="ild", hylo_teacher_fp8=True), "--hylo-teacher-fp8: --hylo-stage ild would learn its rounding"),
    (dict(optimizer_cpu_offload=True), "--optimizer-cpu-offload .* use --hylo-offload-optimizer"),
    (dict(teacher="big", hylo_hidden_weight=1), "--hylo-hidden-weight: student and teacher are 64 and 96 wide"),
])  # fmt: skip
def test_what_does_not_go_together_is_refused(world, monkeypatch, flags, words):
    from hylo_megatron.config import Architecture
    from hylo_megatron.distill import command_line
    from hylo_megatron.errors import HyLoError

    monkeypatch.setenv("WORLD_SIZE", "2")
    argv = list(map(str, helpers.train_flags(world, **{"stage": "distill", "save": "x"} | flags)))
    with pytest.raises(HyLoError, match=words):
        known = command_line.user_flags(argv)
        command_line.check_given(known, argv)
        command_line.check_models(known, Architecture.load(world["student"]))
