"""Head dimensions that no published geometry has: from conversion to the exported model, or refused in one line."""

from dataclasses import replace

import pytest
import torch

pytest.importorskip("transformers")
from helpers import tiny  # noqa: E402
from programs.logits import logits  # noqa: E402

from hylo_megatron.config import MLAGeometry, geometry_preset  # noqa: E402
from hylo_megatron.config.geometry import check_heads  # noqa: E402
from hylo_megatron.convert import hf_to_megatron, megatron_to_hf  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.hf import HyLoForCausalLM  # noqa: E402
from hylo_megatron.init.teacher import BaseModel  # noqa: E402
from hylo_megatron.init.upcycle import upcycle  # noqa: E402
from hylo_megatron.kernels.rope import rope_frequencies  # noqa: E402
from hylo_megatron.layers.load import load_model  # noqa: E402
from hylo_megatron.mixers.mla.geometry import rotary_width  # noqa: E402
from hylo_megatron.mixers.mla.initialise import _nope_rows, _pair_rows, from_rows, rope_pairs  # noqa: E402
from hylo_megatron.mixers.mla.serving import LATENT_RANKS, PREFILL, ROPE  # noqa: E402
from hylo_megatron.serve.geometry import serve  # noqa: E402

pytestmark = pytest.mark.usefixtures("process_groups")

# head dim: (hidden size, heads, key-value heads); most heads are wider than hidden size / heads
MODELS = {
    20: (60, 5, 1), 36: (60, 3, 3), 72: (64, 4, 2), 80: (64, 2, 1), 96: (60, 3, 1), 100: (64, 2, 2), 112: (64, 4, 2),
    120: (60, 6, 3), 160: (64, 2, 1), 192: (60, 3, 1), 256: (64, 2, 2),
}  # fmt: skip
ROTARY = {
    20: 20,
    36: 36,
    64: 64,
    72: 36,
    80: 40,
    96: 48,
    100: 50,
    112: 56,
    120: 60,
    128: 64,
    160: 40,
    192: 64,
    256: 64,
}


def teacher(folder, dim: int, **changes):
    hidden, heads, groups = MODELS[dim]
    model = tiny.teacher_model(
        "llama", hidden_size=hidden, num_attention_heads=heads, num_key_value_heads=groups, head_dim=dim,
        num_hidden_layers=2, **changes,
    )  # fmt: skip
    hf_to_megatron.convert(tiny.save_model(model, folder / "hf"), folder / "teacher")
    return model


@torch.no_grad()
def compare(model, checkpoint) -> torch.nn.Module:
    """The Megatron model of ``checkpoint``, whose logits equal ``model``'s."""
    megatron, _ = load_model(checkpoint)
    want = model(tiny.tokens()).logits
    assert want.std() > 0.2
    assert (logits(megatron, tiny.tokens()) - want).abs().max() <= 1e-4
    return megatron


@pytest.mark.parametrize("dim", MODELS)
def test_from_conversion_to_the_exported_model(dim, tmp_path):
    linear = "mamba2" if dim in (36, 80, 100, 192) else "gdn"
    compare(teacher(tmp_path, dim), tmp_path / "teacher")
    report = upcycle(tmp_path / "teacher", tmp_path / "student", ("mla", linear), tokens_BS=tiny.tokens(4, 64),
                     log=lambda line: None)  # fmt: skip
    assert report["layers"][0]["error"] < 0.6
    megatron_to_hf.convert(tmp_path / "student", tmp_path / "out")
    exported = HyLoForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    student = compare(exported, tmp_path / "student")
    before = [parameter.detach().clone() for parameter in student.parameters()]
    tokens = tiny.tokens()
    student(tokens, torch.arange(tokens.shape[1]).expand(len(tokens), -1), None).logsumexp(-1).mean().backward()
    torch.optim.SGD(student.parameters(), 0.1).step()
    moved = [not torch.equal(a, b) for a, b in zip(before, student.parameters(), strict=True)]
    assert all(moved) and all(parameter.isfinite().all() for parameter in student.parameters())


@pytest.mark.parametrize("dim", ROTARY)
def test_rotary_pairs_are_pairs_of_the_head_and_a_gpu_has_a_kernel(dim):
    geometry, mla = (g := geometry_preset("native", 32 * dim, 32, dim)), g.mla
    assert mla.qk_rope_head_dim == rotary_width(dim) == ROTARY[dim]
    arch = tiny.hybrid(head_dim=dim, geometry=geometry)
    whole, part = (rope_frequencies(tiny.DEFAULT, width, 256)[0] for width in (dim, mla.qk_rope_head_dim))
    torch.testing.assert_close(whole[rope_pairs(arch)], part)
    rows = torch.cat([_pair_rows(rope_pairs(arch), dim), _nope_rows(arch, rope_pairs(arch))])
    assert set(rows.tolist()) == set(range(dim))  # nothing of a head is left out
    for norm in (False, True):
        served = serve(geometry, {"mla", "gdn"}, 32, norm, on_gpu=True)
        if norm:
            assert served.expanded >= dim
        else:
            assert (served.geometry.mla.kv_lora_rank, served.geometry.mla.qk_rope_head_dim) == (LATENT_RANKS[0], ROPE)
            assert (served.geometry.mla.qk_nope_head_dim, served.geometry.mla.v_head_dim) in PREFILL
        assert served.geometry.gdn == geometry.gdn


@pytest.mark.parametrize("dim, words", [
    (74, "head_dim 74.*the widest is 2.*multiples of 8"), (70, "widest is 14"), (45, "even"), (320, "at most 256"),
])  # fmt: skip
def test_what_has_no_native_geometry_is_refused_before_anything_is_written(dim, words, tmp_path):
    with pytest.raises(HyLoError, match=words):
        geometry_preset("native", 32 * dim, 32, dim)
    if dim % 2 == 0:
        model = tiny.teacher_model("llama", head_dim=dim, num_hidden_layers=1)
        with pytest.raises(HyLoError, match=words):
            hf_to_megatron.convert(tiny.save_model(model, tmp_path / "hf"), tmp_path / "out")
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("mla, gdn, words", [
    (dict(qk_rope_head_dim=24), {}, "24 must divide the head dimension 80.*native takes 40"),
    (dict(qk_nope_head_dim=88), {}, "qk_nope_head_dim 88.*at most the head dimension 80"),
    ({}, dict(key_head_dim=45), "45 key.*even"),
    ({}, dict(key_head_dim=512, value_head_dim=512), "512 key.*at most 256"),
])  # fmt: skip
def test_a_geometry_that_does_not_fit_the_heads_is_refused(mla, gdn, words):
    geometry = geometry_preset("native", 2560, 32, 80)
    check_heads(80, geometry, {"mla", "gdn"})
    changed = replace(geometry, mla=replace(geometry.mla, **mla), gdn=replace(geometry.gdn, **gdn))
    with pytest.raises(HyLoError, match=words):
        check_heads(80, changed, {"mla", "gdn"})
    check_heads(80, changed, {"mamba2"})  # what the plan does not have may be anything


def test_rows_in_both_parts_count_once(tmp_path):
    """Full rank, one key-value head: with every pair rotated, a copy of one of them in the no-position part halves
    both copies' scores and leaves those of the other pairs."""
    teacher(tmp_path, 80)
    base = BaseModel(tmp_path / "teacher", torch.device("cpu"))
    layer = next(iter(base.layers(tiny.tokens())))
    arch = replace(base.arch, plan=("mla", "mla"), geometry=geometry_preset("native", 64, 2, 80))
    arch = replace(arch, geometry=replace(arch.geometry, mla=MLAGeometry(160, 2, 80, 80)))
    weights = from_rows(layer, arch)
    query = weights["self_attn.q_proj.weight"].view(2, 82, 64) / (82 / 80) ** 0.5
    base_query = layer["self_attn.q_proj.weight"].view(2, 80, 64)
    first = [0, 40]  # the pair that is in both parts
    torch.testing.assert_close(query[:, :2], 0.5 * base_query[:, first])
    torch.testing.assert_close(query[:, [2, 42]], 0.5 * base_query[:, first])
    others = [row for row in range(80) if row not in first]
    torch.testing.assert_close(query[:, [2 + row for row in others]], base_query[:, others])
