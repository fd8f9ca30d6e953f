"""A hybrid joined from an all-MLA and an all-linear student computes as each layer's own student, or is refused."""

from dataclasses import replace

import pytest
import torch
from helpers import tiny

from hylo_megatron.config import Plan
from hylo_megatron.convert.assemble import assemble, plan_for
from hylo_megatron.errors import HyLoError

PLAN = Plan.parse(4, "1,2", "gdn")
LINEAR = dict(linear_rope=True, window=tiny.WINDOW)


def written(folder, kind: str, seed: int, **changes):
    """Write the checkpoint of a student whose layers are all of ``kind``, and return its folder."""
    tiny.write_hybrid(folder, tiny.hybrid(plan=(kind,) * 4, **changes), seed=seed)
    return folder


def test_layers_keep_what_they_read_of_positions(tmp_path):
    from hylo_megatron.convert import megatron_to_hf
    from hylo_megatron.hf import HyLoForCausalLM

    settings = dict(mla_rope=False, log_scale=tiny.LOG_SCALE)
    mla, linear = written(tmp_path / "mla", "mla", 0, **settings), written(tmp_path / "linear", "gdn", 1, **LINEAR)
    arch = assemble(mla, linear, PLAN, tmp_path / "out")
    assert arch == replace(arch, **settings, **LINEAR)
    models = []
    for name in ("out", "mla", "linear"):
        megatron_to_hf.convert(tmp_path / name, tmp_path / f"hf-{name}")
        models.append(HyLoForCausalLM.from_pretrained(tmp_path / f"hf-{name}").eval().model)
    hybrid, *students = models
    states = torch.randn(2, 40, arch.hidden_size, generator=torch.Generator().manual_seed(0))
    positions = torch.arange(40)[None]
    with torch.no_grad():
        for number, kind in enumerate(PLAN):
            own = students[kind != "mla"]
            got, want = (m.layers[number](states, m.rotation(positions), None, None, None) for m in (hybrid, own))
            if kind == "mla":
                assert torch.equal(got, want)
            else:  # the MLP is the MLA student's
                mixers = (m.layers[number].mixer(states, m.rotation(positions)) for m in (hybrid, own))
                assert torch.equal(*mixers)


ROPE = {**tiny.DEFAULT, "rope_theta": 4e5}
REFUSED = {
    "rope_parameters .* train both with the same --hylo-rope": (dict(), dict(rope_parameters=ROPE, **LINEAR)),
    "rms_norm_eps: they must come from the same base": (dict(), dict(rms_norm_eps=1e-6)),
    "num_key_value_heads: they must come from the same base": (dict(), dict(num_key_value_heads=4, **LINEAR)),
}


@pytest.mark.parametrize("message", REFUSED)
def test_students_that_do_not_fit_are_refused(message, tmp_path):
    first, second = REFUSED[message]
    mla, linear = written(tmp_path / "mla", "mla", 0, **first), written(tmp_path / "linear", "gdn", 1, **second)
    with pytest.raises(HyLoError, match=message):
        assemble(mla, linear, PLAN, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_base_model_is_no_student(tmp_path):
    linear = written(tmp_path / "linear", "gdn", 1)
    tiny.hybrid().as_teacher().save(tmp_path)
    for refused in (lambda: assemble(tmp_path, linear, PLAN, "out"), lambda: plan_for("0", None, linear, tmp_path)):
        with pytest.raises(HyLoError, match=f"^{tmp_path}: a Transformer, expected a student; run hylo upcycle"):
            refused()


def test_a_setting_without_its_layers_is_refused(tmp_path):
    mla = written(tmp_path / "mla", "mla", 0, mla_rope=False)
    linear = written(tmp_path / "linear", "gdn", 1)
    with pytest.raises(HyLoError, match="mla_rope is False, but the plan has no mla layers; choose other layers"):
        assemble(mla, linear, Plan.parse(4, "none", "gdn"), tmp_path / "out")
    other = written(tmp_path / "other", "gdn", 1, rope_parameters=ROPE)  # which its layers do not read
    assert assemble(mla, other, PLAN, tmp_path / "out").rope_parameters == tiny.DEFAULT


def test_a_hybrids_layers_have_the_windows_of_their_kind(tmp_path):
    """A student may be a hybrid, whose layers of the other kind are not taken."""
    settings = dict(LINEAR, window=tiny.WINDOWS)
    plain, linear = written(tmp_path / "plain", "mla", 0), written(tmp_path / "linear", "gdn", 1, **LINEAR)
    for name, changes in (("one", LINEAR), ("all", settings)):
        tiny.write_hybrid(tmp_path / name, tiny.hybrid(**changes), seed=2)  # mla, gdn, gdn, mla
    outer = Plan.parse(4, "0,3", "gdn")

    def window(mla, linear) -> dict | None:
        return assemble(mla, linear, outer, tmp_path / f"{mla.name}-{linear.name}").window

    assert window(tmp_path / "one", linear) == window(plain, tmp_path / "all") == tiny.WINDOW
    assert window(tmp_path / "all", linear) == tiny.WINDOWS
    other = written(tmp_path / "other", "gdn", 1, linear_rope=True, window={"size": 7, "sinks": 2})
    with pytest.raises(HyLoError, match="expected one size, or none in"):
        window(tmp_path / "all", other)
