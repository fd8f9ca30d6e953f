"""Releases that cannot be converted exactly are refused in one line that says where, what and what to do."""

import pytest
import torch

pytest.importorskip("transformers")
from helpers import amd_reference as reference  # noqa: E402
from helpers import tiny  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from hylo_megatron.checkpoint import disk  # noqa: E402
from hylo_megatron.convert.amd_release import convert as amd  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402

HYBRID, TENSORS = "hybrid_config.json", "model.safetensors"


@pytest.fixture
def release(tmp_path):
    return reference.write(tmp_path / "HyLo-Qwen-2MLA2GDN-8K-SFT", "qwen1p7b-gdn")


def _field(**changes):
    return lambda release: tiny.edit_json(release.folder / HYBRID, **changes)


def _base(**changes):
    return lambda release: tiny.edit_json(release.folder / "config.json", **changes)


def _rope(**scaling):
    return _field(rope_scaling=dict(rope_type="yarn", factor=4.0) | scaling)


def _tensors(change):
    def spoil(release):
        state = dict(release.state)
        change(state)
        save_file(state, release.folder / TENSORS)

    return spoil


def _mamba(**changes):
    """The release's folder with a Mamba-2 release of changed ``ssm_cfg`` in it."""

    def spoil(release):
        other = reference.write(release.folder / "other", "qwen1p7b-m2")
        for path in other.folder.iterdir():
            path.rename(release.folder / path.name)
        other.folder.rmdir()
        tiny.edit_json(release.folder / HYBRID, **{"ssm_cfg": other.hybrid["ssm_cfg"] | changes})

    return spoil


def _pickle_only(release):
    (release.folder / TENSORS).rename(release.folder / "pytorch_model.bin")


KV_B, GATE = "model.layers.1.mla.kv_b_proj.weight", "model.layers.2.gdn.g_proj.weight"
BAD = {
    "unknown tensor": (_tensors(lambda s: s.update({"model.layers.0.gdn.D": torch.ones(6)})),
                       ["unexpected tensor model.layers.0.gdn.D", "amd_release/tables.py"]),
    "norm on the latent": (_tensors(lambda s: s.update({"model.layers.1.mla.kv_a_layernorm.weight": torch.ones(24)})),
                           ["unexpected tensor model.layers.1.mla.kv_a_layernorm.weight"]),
    "missing tensor": (_tensors(lambda s: s.pop(GATE)), [GATE, "missing", "[96, 64]"]),
    "wrong shape": (_tensors(lambda s: s.update({KV_B: s[KV_B][:-1].clone()})),
                    [TENSORS, KV_B, "[47, 24]", "hybrid_config.json asks for [48, 24]"]),
    "output differs": (_tensors(lambda s: s.update({"lm_head.weight": s["lm_head.weight"] + 1})),
                       ["lm_head.weight differs", "tie_word_embeddings", "set it to false"]),
    "pickle only": (_pickle_only, ["pytorch_model.bin", "pickle"]),
    "no hybrid_config": (lambda r: (r.folder / HYBRID).unlink(), [HYBRID, "not found"]),
    "latent norms": (_field(use_lora_layer_norm=True), [HYBRID, "use_lora_layer_norm is True, expected False"]),
    "biases": (_field(attention_bias=True), [HYBRID, "attention_bias is True"]),
    "unknown field": (_field(use_nope=False, gdn_twist=2), [HYBRID, "use_nope", "--ignore-field gdn_twist"]),
    "another GDN": (_field(gdn_expand_v=1.5), [HYBRID, "gdn_expand_v is 1.5, expected 2"]),
    "missing field": (_field(kv_lora_rank=None), [HYBRID, "kv_lora_rank is missing, expected a positive integer"]),
    "no layers": (_field(mla_layers=[1, 4]), [HYBRID, "mla_layers is [1, 4]", "0 to 3"]),
    "another base": (_base(hidden_size=32), [HYBRID, "hidden_size is 64.0, expected 32 as in config.json"]),
    "another eps": (_field(rms_norm_eps=1e-5), [HYBRID, "rms_norm_eps is 1e-05, expected 1e-06"]),
    "linear kind": (_field(linear_type="kda"), [HYBRID, "linear_type is 'kda', expected one of gdn, mamba"]),
    "not the linear kind": (_field(linear_type="mamba"), ["model.layers.0.mamba.in_proj.weight is missing"]),
    "rope type": (_rope(rope_type="dynamic"), [HYBRID, "rope_scaling.rope_type is 'dynamic'", "yarn"]),
    "scaled scores": (_rope(mscale_all_dim=1.0), [HYBRID, "rope_scaling.mscale_all_dim is 1.0", "attention scores"]),
    "rope field": (_rope(attention_factor=1.2), [HYBRID, "rope_scaling.attention_factor", "1.2"]),
    "norm before gate": (_mamba(norm_before_gate=True), [HYBRID, "ssm_cfg.norm_before_gate is True, expected False"]),
    "skip per channel": (_mamba(D_has_hdim=True), [HYBRID, "ssm_cfg.D_has_hdim"]),
    "clamped steps": (_mamba(dt_limit=[0.0, 1.0]), [HYBRID, "ssm_cfg.dt_limit is [0.0, 1.0]"]),
    "groups": (_mamba(ngroups=1), [HYBRID, "d_inner is 64, expected ssm_cfg's ngroups x d_state = 16"]),
    "tokenizer": (lambda r: tiny.write_tokenizer(r.folder, 301), ["tokenizer.json", "300", "vocab_size"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_releases_are_refused_and_leave_nothing(tmp_path, release, name):
    spoil, words = BAD[name]
    spoil(release)
    with pytest.raises(HyLoError) as caught:
        amd.convert(release.folder, tmp_path / "out")
    message = str(caught.value)
    assert "\n" not in message
    assert not [word for word in words if word not in message], message
    assert [path.name for path in tmp_path.iterdir()] == [release.folder.name]


def test_a_conversion_that_breaks_off_leaves_nothing(tmp_path, release, monkeypatch):
    monkeypatch.setattr(amd, "write_hybrid_config", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        amd.convert(release.folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [release.folder.name]


def test_a_disk_without_room_is_refused_before_a_weight_is_read(tmp_path, release, monkeypatch):
    monkeypatch.setattr(disk, "free", lambda path: 1000)
    monkeypatch.setattr(amd, "write_weights", None)
    with pytest.raises(HyLoError, match="out: no space left: it needs .*iB, 1 KiB is free on its disk; free space or"):
        amd.convert(release.folder, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == [release.folder.name]
