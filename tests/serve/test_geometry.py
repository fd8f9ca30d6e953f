"""What the serving engine runs for a trained geometry: exact padding, and refusals. No vLLM needed."""

import itertools
from dataclasses import replace

import pytest
import torch
from helpers import tiny

from hylo_megatron.config import GDNGeometry, Geometry, Mamba2Geometry, MLAGeometry, geometry_preset
from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels.rope import rotate
from hylo_megatron.mixers.mla import vllm_weights
from hylo_megatron.mixers.vllm_weights import conv_loader, pad, spread
from hylo_megatron.mixers.window import cached_values, holders, places_of
from hylo_megatron.planner.pages import Pages, expanded_bytes, pages, state_bytes
from hylo_megatron.serve.geometry import serve
from hylo_megatron.serve.weights import Padding, check_parts, served_weights

MAMBA2 = Mamba2Geometry(4, 16, 16, 4)
SMALL = Geometry(MLAGeometry(6, 6, 4, 5), GDNGeometry(2, 2, 4, 8), MAMBA2)
WIDE = Geometry(MLAGeometry(8, 8, 8, 8), GDNGeometry(2, 4, 4, 4), MAMBA2)
HEADS = 3
PADDING = Padding(trained=SMALL, served=WIDE, heads=HEADS, kinds=frozenset(("mla", "gdn")))


def test_native_geometry_keeps_its_cache_and_published_ones_are_padded():
    native = geometry_preset("native", 2048, 16, 128)
    found = serve(native, {"mla", "gdn"}, 16, False, on_gpu=True)
    assert found.geometry == native and not found.notes
    published = geometry_preset("published", 2048, 32, 64)
    found = serve(published, {"mla", "gdn"}, 32, False, on_gpu=True)
    assert found.geometry.mla == MLAGeometry(256, 64, 64, 128, q_lora_rank=1344)
    assert found.geometry.gdn == GDNGeometry(6, 12, 256, 256)
    assert "640 bytes" in found.notes[0] and "instead of 320" in found.notes[0] and "share keys" in found.notes[1]
    assert serve(published, {"mla", "gdn"}, 32, False, on_gpu=False).geometry == published  # a CPU takes it as it is


def test_a_norm_on_keys_expands_the_cache_and_says_so():
    qwen = geometry_preset("published", 2048, 16, 128)
    found = serve(qwen, {"mla", "mamba2"}, 16, True, on_gpu=True)
    assert found.expanded == 128 and found.geometry == qwen and "8,192 bytes" in found.notes[0]


@pytest.mark.parametrize("change, kind, word", [
    (dict(mla=MLAGeometry(640, 64, 64, 128)), "mla", "kv_lora_rank 640"),
    (dict(mla=MLAGeometry(256, 64, 128, 128)), "mla", "qk_rope_head_dim 128"),
    (dict(mla=MLAGeometry(256, 64, 64, 512)), "mla", "512 value"),
    (dict(gdn=GDNGeometry(2, 2, 512, 512)), "gdn", "512 key"),
    (dict(gdn=GDNGeometry(2, 2, 128, 192)), "gdn", "not a multiple"),
])  # fmt: skip
def test_what_no_kernel_reaches_is_refused_on_a_gpu_only(change, kind, word):
    geometry = replace(geometry_preset("native", 2048, 16, 128), **change)
    with pytest.raises(HyLoError, match=word):
        serve(geometry, {kind}, 16, False, on_gpu=True)
    serve(geometry, {kind}, 16, False, on_gpu=False)


def scores_and_values(geometry: Geometry, query, latent, key_value, x):
    """Attention scores ``[H, T, T]`` after rotation and values ``[T, H, V]`` of inputs ``[T, D]``."""
    mla, (tokens, _) = geometry.mla, x.shape
    q = (x @ query.T).unflatten(-1, (HEADS, -1))
    c, k_rope = (x @ latent.T).split([mla.kv_lora_rank, mla.qk_rope_head_dim], -1)
    k_nope, value = (c @ key_value.T).unflatten(-1, (HEADS, -1)).split([mla.qk_nope_head_dim, mla.v_head_dim], -1)
    angles = torch.arange(tokens)[:, None] * pad(torch.tensor([1.0, 0.3]), 0, mla.qk_rope_head_dim // 2)

    def turn(part):
        return rotate(part.unsqueeze(1), angles.cos(), angles.sin())[:, 0]

    q = torch.cat([q[..., : mla.qk_nope_head_dim], turn(q[..., mla.qk_nope_head_dim :])], -1)
    key = torch.cat([k_nope, turn(k_rope.unsqueeze(1)).expand(-1, HEADS, -1)], -1)
    return torch.einsum("shk,thk->hst", q, key), value


def test_padded_latent_attention_is_the_same():
    torch.manual_seed(0)
    mla, hidden = SMALL.mla, 7
    query = torch.randn(HEADS * (mla.qk_nope_head_dim + mla.qk_rope_head_dim), hidden)
    latent = torch.randn(mla.kv_lora_rank + mla.qk_rope_head_dim, hidden)
    key_value = torch.randn(HEADS * (mla.qk_nope_head_dim + mla.v_head_dim), mla.kv_lora_rank)
    x, sizes = torch.randn(5, hidden), PADDING.sizes("mla")
    scores, values = scores_and_values(SMALL, query, latent, key_value, x)
    rules = vllm_weights.query, vllm_weights.latent, vllm_weights.key_value
    wide = [rule(x, sizes) for rule, x in zip(rules, (query, latent, key_value), strict=True)]
    wide_scores, wide_values = scores_and_values(WIDE, *wide, x)
    torch.testing.assert_close(wide_scores, scores)
    torch.testing.assert_close(wide_values[..., : mla.v_head_dim], values)
    assert not wide_values[..., mla.v_head_dim :].any()
    assert spread(torch.arange(1, 5), 0, 8).tolist() == [1, 2, 0, 0, 3, 4, 0, 0]


def test_every_tensor_finds_its_place_or_is_an_error():
    parts = {"q": 8, "k": 8, "v": 16}
    weights = [(f"model.layers.3.mixer.{part}_conv1d.weight", torch.full((n, 1, 4), n)) for part, n in parts.items()]
    weights += [("model.layers.3.mixer.A_log", torch.tensor([1.0, 2.0])), ("model.norm.weight", torch.ones(2))]
    for order in itertools.permutations(weights):
        found = {(name, part): tensor for name, tensor, part in served_weights(order, PADDING)}
        conv = torch.zeros(32, 1, 4)
        load = conv_loader([8, 8, 16], ranks=1, rank=0)
        for part in range(3):
            load(conv, found.pop(("model.layers.3.mixer.conv1d.weight", part)), part)
        assert set(found) == {("model.layers.3.mixer.A_log", None), ("model.norm.weight", None)}
        assert conv[:, 0, 0].tolist() == [8] * 16 + [16] * 16
        assert found["model.layers.3.mixer.A_log", None].tolist() == [1, 1, 2, 2]  # a head became two
    with pytest.raises(HyLoError, match="model.layers.0.self_attn.other.weight"):
        list(served_weights([("model.layers.0.self_attn.other.weight", torch.ones(1))], PADDING))


@pytest.mark.parametrize("linear, merged", [
    ("gdn", ("mlp.gate_proj", "mlp.up_proj")),
    ("mamba2", ("mlp.gate_proj", "mlp.up_proj")),
    ("gdn", tuple(f"mixer.{part}_proj" for part in "qkvg")),
    ("gdn", ("mixer.b_proj", "mixer.a_proj")),
    ("gdn", tuple(f"mixer.{part}_conv1d" for part in "qkv")),
    ("kda", tuple(f"mixer.{part}_proj" for part in ("q", "k", "v", "b", "f_a"))),
    ("gdn", tuple(f"mixer.window.{part}_proj" for part in "qkv")),
    ("gdn", tuple(f"self_attn.window.{part}_proj" for part in "qkv")),
])  # fmt: skip
def test_a_parameter_of_several_tensors_needs_them_all(linear, merged):
    kinds = frozenset(("mla", linear))
    weights = [(f"model.layers.3.{name}.weight", torch.ones(2, 4)) for name in merged]

    def loaded(given) -> set:
        return {(name, part) for name, _, part in served_weights(given, replace(PADDING, kinds=kinds))}

    check_parts(loaded(weights), kinds)
    for missing, _ in weights:
        with pytest.raises(HyLoError, match=f"{missing} is missing"):
            check_parts(loaded([(name, x) for name, x in weights if name != missing]), kinds)


def test_pages_are_those_that_vllm_reported():
    """vLLM 0.26 on an H200, Llama-3.2-3B's shape, 6MLA22GDN, native: its block size, and what it had fit."""
    served = serve(geometry_preset("native", 3072, 24, 128), {"mla", "gdn"}, 24, False, on_gpu=True)
    found = pages(served, ("mla",) * 6 + ("gdn",) * 22, 24)
    cache = 124_263_628_800
    assert found.block == 3776 and cache == 8570 * found.block_bytes
    assert [found.requests(cache, n) for n in (2048, 32768, 1 << 20)] == [1713, 659, 30]
    assert [Pages(16, 1, layers).group for layers in ((6, 22), (12, 16), (14, 14), (4, 0))] == [6, 16, 14, 4]
    asked = 1024 * found.block * expanded_bytes(served, 24)
    assert round(asked / 2**30, 2) == 33.19


@pytest.mark.parametrize("plan, found", [
    ("gmgg", {1: (0, 1)}),
    ("mggm", {0: (1, 1), 3: (2, 1)}),
    ("mgmmg", {0: (1, 1), 2: (1, 2), 3: (4, 1)}),
])  # fmt: skip
def test_windows_of_mla_are_among_the_states_of_linear_layers(plan, found):
    kinds, window = [{"m": "mla", "g": "gdn"}[letter] for letter in plan], {"size": 8, "sinks": 1, "mla": True}
    own = {layer: (layer, 0) for layer, kind in enumerate(kinds) if kind == "gdn"}
    assert holders(kinds, window) == own | found
    assert holders(kinds, {"size": 8, "sinks": 1}) == own
    assert places_of(kinds, window) == 1 + max(place for _, place in found.values())
    assert places_of(kinds, {"size": 8, "sinks": 1}) == 1 and places_of(kinds, None) == 0


def test_windows_of_mla_are_among_the_states_of_their_pipeline_stage():
    kinds, window = ["gdn", "mla", "mla", "gdn", "gdn", "mla"], {"size": 8, "sinks": 1, "mla": True}
    assert holders(kinds, window)[2] == (3, 1) and places_of(kinds, window) == 2
    stages = [range(3), range(3, 6)]
    found = {1: (0, 1), 2: (0, 2), 5: (4, 1)}
    assert holders(kinds, window, stages) == {layer: (layer, 0) for layer in (0, 3, 4)} | found
    assert places_of(kinds, window, stages) == 3
    assert 3 not in holders(["mla", "gdn", "gdn", "mla"], window, [range(3), range(3, 4)])


def test_a_window_is_a_part_of_each_linear_layers_state():
    arch = replace(tiny.hybrid("gdn"), window={"size": 256, "sinks": 4})
    values, layers = cached_values(arch), sum(kind == "gdn" for kind in arch.plan)
    assert 2 * values * layers == arch.window_bytes()
    served = serve(geometry_preset("native", 3072, 24, 128), {"mla", "gdn"}, 24, False, on_gpu=True)
    plan = ("mla",) * 6 + ("gdn",) * 22
    plain, wide = (pages(served, plan, 24, window=window) for window in (0, values))
    assert state_bytes(served, "gdn", window=values) == state_bytes(served, "gdn") + 2 * values
    assert plain.page_bytes < state_bytes(served, "gdn", window=values) <= wide.page_bytes
