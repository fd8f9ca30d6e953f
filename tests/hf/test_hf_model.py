"""The transformers model: each mixer against transformers' own of that kind, caches, padding, saving, registration."""

import copy
import inspect
import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from helpers.hf import HYBRIDS, LLAMA3, YARN, each_hybrid, model_of, scatter, tiny_config  # noqa: E402
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM  # noqa: E402

import hylo_megatron  # noqa: E402, F401  (registers the model)
from hylo_megatron.config import Architecture, geometry_preset  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.hf.cache import HyLoCache  # noqa: E402
from hylo_megatron.hf.configuration_hylo import HyLoConfig  # noqa: E402
from hylo_megatron.hf.modeling_hylo import HyLoForCausalLM  # noqa: E402
from hylo_megatron.kernels.rope import rope_frequencies  # noqa: E402
from hylo_megatron.mixers.gdn.hf_module import HyLoGatedDeltaNet  # noqa: E402
from hylo_megatron.mixers.hf_layers import Rotation  # noqa: E402
from hylo_megatron.mixers.kda.hf_module import HyLoKimiDeltaAttention  # noqa: E402
from hylo_megatron.mixers.mamba2.hf_module import HyLoMamba2  # noqa: E402
from hylo_megatron.mixers.mla.hf_module import HyLoMLA  # noqa: E402

# ---- mixers against transformers' ----


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("low_rank", [True, False])
def test_mla_matches_deepseek_v3(interleaved, low_rank):
    from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek

    config = tiny_config(q_lora_rank=24 if low_rank else None)
    keys = ("hidden_size", "num_attention_heads", "q_lora_rank", "kv_lora_rank", "qk_nope_head_dim")
    keys += ("qk_rope_head_dim", "v_head_dim", "rope_parameters", "max_position_embeddings")
    values = {name: copy.deepcopy(getattr(config, name)) for name in keys}
    reference_config = deepseek.DeepseekV3Config(
        **values, num_key_value_heads=4, attention_bias=False, rope_interleave=interleaved
    )
    reference_config._attn_implementation = "eager"
    mla, reference = scatter(HyLoMLA(config, 0)), deepseek.DeepseekV3Attention(reference_config, 0)
    reference.load_state_dict(mla.state_dict(), strict=False)
    reference.q_a_layernorm = reference.kv_a_layernorm = nn.Identity()  # we have no latent norms
    if interleaved:  # DeepSeek's order of rope dims: pairs side by side
        order = torch.arange(8).view(2, 4).T.flatten()
        rope_rows = torch.arange(4 * 14).view(4, 14)
        rope_rows[:, 6:] = rope_rows[:, 6:][:, order]
        query = reference.q_b_proj if low_rank else reference.q_proj
        query.weight.data = query.weight.data[rope_rows.flatten()]
        kv_rows = torch.cat([torch.arange(20), 20 + order])
        reference.kv_a_proj_with_mqa.weight.data = reference.kv_a_proj_with_mqa.weight.data[kv_rows]
    x, positions = torch.randn(2, 13, 32), torch.arange(13).unsqueeze(0)
    mask = torch.full((13, 13), -torch.inf).triu(1)[None, None]
    cos_sin = deepseek.DeepseekV3RotaryEmbedding(reference_config)(x, positions)
    expected = reference(x, cos_sin, mask)[0]
    torch.testing.assert_close(mla(x, Rotation(config)(positions), None), expected, atol=1e-5, rtol=1e-4)


def test_gdn_matches_qwen3_next(monkeypatch):
    from transformers.models.qwen3_next import modeling_qwen3_next as qwen

    for name in ("torch_chunk_gated_delta_rule", "causal_conv1d_fn"):  # not fla's, which need a GPU
        monkeypatch.setattr(qwen, name, inspect.unwrap(getattr(qwen, name)))
    config = tiny_config()
    reference_config = qwen.Qwen3NextConfig(
        hidden_size=32, linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8,
        linear_value_head_dim=12, linear_conv_kernel_dim=4, rms_norm_eps=config.rms_norm_eps, num_hidden_layers=1,
        layer_types=["linear_attention"],
    )  # fmt: skip
    gdn, reference = scatter(HyLoGatedDeltaNet(config, 0)), qwen.Qwen3NextGatedDeltaNet(reference_config, 0)
    w = {name: value for name, value in gdn.state_dict().items()}
    per_key_head = [w[f"{n}_proj.weight"].view(2, -1, 32) for n in "qkvgba"]
    target = reference.state_dict()
    target["in_proj_qkvz.weight"] = torch.cat(per_key_head[:4], 1).flatten(0, 1)
    target["in_proj_ba.weight"] = torch.cat(per_key_head[4:], 1).flatten(0, 1)
    target["conv1d.weight"] = torch.cat([w[f"{n}_conv1d.weight"] for n in "qkv"])
    target |= {"A_log": w["A_log"], "dt_bias": w["dt_bias"], "norm.weight": w["o_norm.weight"]}
    target["out_proj.weight"] = w["o_proj.weight"]
    reference.load_state_dict(target)
    x = torch.randn(2, 70, 32)
    torch.testing.assert_close(gdn(x), reference(x), atol=1e-5, rtol=1e-4)


def test_kda_matches_kimi_linear(monkeypatch):
    from transformers.models.kimi_linear import modeling_kimi_linear as kimi

    for name in ("chunk_kimi_delta_attention", "causal_conv1d_fn"):  # not fla's, which need a GPU
        function = inspect.getclosurevars(getattr(kimi, name)).nonlocals["torch_function"]
        monkeypatch.setattr(kimi, name, function)
    config = tiny_config(("kda",))
    reference_config = kimi.KimiLinearConfig(
        hidden_size=32, linear_num_heads=4, linear_head_dim=6, linear_conv_kernel_dim=4, num_hidden_layers=1,
        rms_norm_eps=config.rms_norm_eps, layer_types=["linear_attention"], mlp_layer_types=["dense"],
    )  # fmt: skip
    kda, reference = scatter(HyLoKimiDeltaAttention(config, 0)), kimi.KimiLinearDeltaAttention(reference_config, 0)
    target = {name: value for name, value in kda.state_dict().items() if "conv1d" not in name}
    target["conv1d.weight"] = torch.cat([kda.get_parameter(f"{n}_conv1d.weight") for n in "qkv"])
    for name in ("f_a_proj.weight", "f_b_proj.weight", "A_log", "dt_bias"):
        target[f"forget_gate.{name}"] = target.pop(name)
    target["forget_gate.A_log"] = target["forget_gate.A_log"].view(1, 1, 4, 1)
    reference.load_state_dict(target)
    x = torch.randn(2, 70, 32)
    torch.testing.assert_close(kda(x), reference(x), atol=1e-5, rtol=1e-4)


def test_mamba2_matches_transformers():
    from transformers.models.mamba2 import modeling_mamba2 as mamba2

    config = tiny_config()
    reference_config = mamba2.Mamba2Config(
        hidden_size=32, num_heads=4, head_dim=8, state_size=6, n_groups=2, expand=1, conv_kernel=4, use_bias=False,
        use_conv_bias=True, layer_norm_epsilon=1e-5, rms_norm=True, chunk_size=16, num_hidden_layers=1,
    )  # fmt: skip
    mixer, reference = scatter(HyLoMamba2(config, 0)), mamba2.Mamba2Mixer(reference_config, 0)
    reference.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 70, 32)
    with torch.no_grad():
        torch.testing.assert_close(mixer(x), reference(x), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("rope", [YARN, LLAMA3, {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}])
def test_rope_scaling_uses_the_rope_dims(rope):
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
    from transformers.models.llama import LlamaConfig

    of_rope_dims = LlamaConfig(
        hidden_size=32, num_attention_heads=4, head_dim=8, max_position_embeddings=64, rope_parameters=dict(rope)
    )
    expected, factor = ROPE_INIT_FUNCTIONS[rope["rope_type"]](of_rope_dims, "cpu")
    got = Rotation(tiny_config(rope_parameters=rope, head_dim=16, qk_rope_head_dim=8))
    positions = torch.arange(5).unsqueeze(0)
    angles = positions[..., None] * expected
    assert torch.equal(got(positions)[0], angles.cos() * factor) and torch.equal(
        got(positions)[1], angles.sin() * factor
    )
    with pytest.raises(HyLoError, match="rope_type 'dynamic'"):
        Rotation(tiny_config(rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}))(positions)


def test_rope_frequencies_are_made_on_the_cpu():
    """Models are built on the meta device, and what is cached then must still have values."""
    parameters = {"rope_type": "default", "rope_theta": 12345.0}
    with torch.device("meta"):
        frequencies, factor = rope_frequencies(parameters, 8, 64)
    assert torch.equal(frequencies, 1.0 / 12345.0 ** (torch.arange(0, 8, 2).float() / 8)) and factor == 1.0


def test_qk_norm_is_per_head_over_all_dims_before_the_rotation():
    config = tiny_config(qk_norm=True)
    mla, positions, x = scatter(HyLoMLA(config, 0)), torch.arange(9).unsqueeze(0), torch.randn(1, 9, 32)
    q = mla.q_norm(mla.q_b_proj(mla.q_a_proj(x)).view(1, 9, 4, 14))
    latent, shared = mla.kv_a_proj_with_mqa(x).split([20, 8], -1)
    k_nope, v = mla.kv_b_proj(latent).view(1, 9, 4, 16).split([6, 10], -1)
    k = mla.k_norm(torch.cat([k_nope, shared.unsqueeze(2).expand(-1, -1, 4, -1)], -1))
    cos, sin = (t.repeat(1, 1, 2).unsqueeze(2) for t in Rotation(config)(positions)[:2])

    def turn(t):
        a, b = t[..., 6:10], t[..., 10:]
        return torch.cat([t[..., :6], t[..., 6:] * cos + torch.cat([-b, a], -1) * sin], -1)

    scores = torch.einsum("bshd,bthd->bhst", turn(q), turn(k)) * 14**-0.5
    weights = (scores + torch.full((9, 9), -torch.inf).triu(1)).softmax(-1)
    expected = mla.o_proj(torch.einsum("bhst,bthv->bshv", weights, v).flatten(-2))
    torch.testing.assert_close(mla(x, Rotation(config)(positions), None), expected, atol=1e-5, rtol=1e-4)


# ---- caches and padding ----


@each_hybrid
@torch.no_grad()
def test_cached_steps_equal_the_whole_sequence(kind):
    model, ids = model_of(**HYBRIDS[kind]), torch.randint(2, 97, (2, 23))
    whole = model(ids, use_cache=False).logits
    cache, parts = HyLoCache(model.config.num_hidden_layers), []
    for span in [slice(0, 9), slice(9, 14), *(slice(i, i + 1) for i in range(14, 23))]:
        parts.append(model(ids[:, span], past_key_values=cache, use_cache=True).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole, atol=1e-4, rtol=0)
    assert cache.get_seq_length() == 23


@torch.no_grad()
def test_cache_size():
    """MLA rows grow by R + P values a token, states not at all."""
    model, sizes = model_of(("mla", "gdn")), []
    for length in (16, 17):
        sizes.append(model(torch.ones(1, length, dtype=torch.long), use_cache=True).past_key_values.num_bytes())
    assert sizes[1] - sizes[0] == 4 * (20 + 8)


@pytest.mark.parametrize("linear", ["gdn", "mamba2", "kda"])
@torch.no_grad()
def test_cached_states_keep_no_sequence_in_memory(linear):
    model = model_of((linear, linear))
    cache = model(torch.ones(1, 50, dtype=torch.long), use_cache=True).past_key_values
    for state in cache[0].values():
        assert state.untyped_storage().nbytes() == state.numel() * state.element_size()


@pytest.mark.parametrize("qk_norm", [False, True])
@torch.no_grad()
def test_whole_prompts_and_single_tokens_need_no_mask(qk_norm, monkeypatch):
    """A mask turns flash attention off; only several tokens after cached ones need one."""
    calls, attend = [], nn.functional.scaled_dot_product_attention

    def record(query, key, value, mask=None, is_causal=False, scale=None):
        calls.append((mask is not None, is_causal))
        if query.dim() == 4:  # flash kernels want one width
            assert query.shape[-1] == key.shape[-1] == value.shape[-1] == 14
        return attend(query, key, value, mask, is_causal=is_causal, scale=scale)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", record)
    model, ids, cache = model_of(("mla",), qk_norm=qk_norm), torch.randint(2, 97, (2, 12)), HyLoCache(1)
    for span in (slice(0, 7), slice(7, 8), slice(8, 12)):
        model(ids[:, span], past_key_values=cache, use_cache=True)
    model(ids, use_cache=False)
    assert calls == [(False, True), (False, False), (True, False), (False, True)]


@torch.no_grad()
def test_hidden_states_are_kept_only_when_asked_for():
    model, ids = model_of(("mla", "gdn")), torch.randint(2, 97, (1, 6))
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3 and torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    first, alive = [], []
    model.model.layers[0].register_forward_pre_hook(lambda layer, args: first.append(weakref.ref(args[0])))
    model.model.norm.register_forward_pre_hook(lambda norm, args: alive.append(first[-1]() is not None))
    for asked in (True, False):
        assert (model(ids, output_hidden_states=asked).hidden_states is not None) is asked
    assert alive == [True, False]


@each_hybrid
@torch.no_grad()
def test_generate_cached_uncached_and_left_padded(kind):
    model = model_of(**HYBRIDS[kind])
    torch.manual_seed(1)
    prompts = [torch.randint(2, 97, (n,)) for n in (11, 4, 7)]
    ids = torch.stack([nn.functional.pad(p, (11 - len(p), 0)) for p in prompts])
    mask = torch.stack([nn.functional.pad(torch.ones_like(p), (11 - len(p), 0)) for p in prompts])
    options = dict(max_new_tokens=12, do_sample=False)
    cached = model.generate(ids, attention_mask=mask, **options)
    assert torch.equal(cached, model.generate(ids, attention_mask=mask, use_cache=False, **options))
    for row, prompt in zip(cached, prompts, strict=True):
        alone = model.generate(prompt[None], attention_mask=torch.ones(1, len(prompt)), **options)
        assert torch.equal(row[11:], alone[0, len(prompt) :])
        padded = model(ids, attention_mask=mask, use_cache=False).logits
    for row, prompt in zip(padded, prompts, strict=True):
        torch.testing.assert_close(row[-len(prompt) :], model(prompt[None]).logits[0], atol=1e-4, rtol=0)
    assert len({tuple(row[11:].tolist()) for row in cached}) == 3, "the prompts make no difference"


@pytest.mark.parametrize("kind", ["gdn", "mamba2", "kda"])
@torch.no_grad()
def test_beam_search(kind):
    model, ids = model_of(**HYBRIDS[kind]), torch.randint(2, 97, (2, 6))
    options = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=8, num_beams=3, do_sample=False, num_return_sequences=3
    )
    assert torch.equal(model.generate(ids, **options), model.generate(ids, use_cache=False, **options))


def test_foreign_caches_and_masks_are_refused():
    from transformers import DynamicCache

    model, ids = model_of(("gdn",)), torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="HyLoCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(1, 3))


# ---- training, saving, registration ----


@each_hybrid
def test_gradients_reach_every_parameter_and_checkpointing_changes_nothing(kind):
    model, ids = model_of(**HYBRIDS[kind]).train(), torch.randint(2, 97, (2, 20))
    loss = model(ids, labels=ids).loss
    loss.backward()
    plain = {name: p.grad.clone() for name, p in model.named_parameters()}
    assert all(grad.abs().max() > 0 for grad in plain.values())
    model.zero_grad()
    getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    model(ids, labels=ids).loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, plain[name])


@each_hybrid
def test_round_trip_is_bit_exact_and_keeps_fp32(kind, tmp_path):
    model = model_of(**HYBRIDS[kind]).to(torch.bfloat16)
    kept = {name for name in model.state_dict() if name.endswith((".A_log", ".dt_bias", "mixer.D"))}
    assert kept
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="auto")
    assert type(loaded) is HyLoForCausalLM and loaded.config.layer_types == model.config.layer_types
    for name, value in model.state_dict().items():
        assert value.dtype == (torch.float32 if name in kept else torch.bfloat16), name
        other = loaded.state_dict()[name]
        assert other.dtype == value.dtype and torch.equal(other, value), name
    precise = model.state_dict()[min(kept)]
    assert not torch.equal(precise, precise.bfloat16().float()), "values that bf16 holds prove nothing"
    ids = torch.randint(2, 97, (1, 12))
    assert torch.equal(loaded.eval()(ids).logits, model(ids).logits)
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == model.config.tie_word_embeddings
    model_of(**HYBRIDS[kind]).save_pretrained(tmp_path / "fp32")
    cast = AutoModelForCausalLM.from_pretrained(tmp_path / "fp32", dtype=torch.bfloat16).state_dict()
    assert all(torch.equal(cast[name], value) for name, value in model.state_dict().items())
    assert AutoModel.from_pretrained(tmp_path).config.model_type == "hylo"


@torch.no_grad()
def test_bf16_logits_from_a_cache_are_near_those_without():
    model, ids = model_of(("mla", "gdn")).to(torch.bfloat16), torch.randint(2, 97, (1, 9))
    want, cache = model(ids, use_cache=False).logits, HyLoCache(2)
    got = torch.cat([model(part, past_key_values=cache).logits for part in ids.split([5, 1, 1, 1, 1], 1)], 1)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, want, atol=0.05 * want.abs().max().item(), rtol=0)


@pytest.mark.parametrize("linear", ["gdn", "mamba2", "kda"])
def test_config_and_architecture_convert_both_ways(linear, tmp_path):
    arch = Architecture(
        "qwen3", 1000, 256, 512, 4, 2, 64, 1e-6, 4096, dict(LLAMA3), True, ("mla", linear, linear), False, True, True,
        geometry_preset("native", 256, 4, 64), {"eos_token_id": [5, 6], "norms": [1.5, 2.0]},
    )  # fmt: skip
    config = HyLoConfig.from_architecture(arch)
    assert config.eos_token_id == [5, 6] and config.tie_word_embeddings and config.linear_type == linear
    assert config.layer_types == ["full_attention", "linear_attention", "linear_attention"]
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert type(loaded) is HyLoConfig and loaded.to_architecture() == arch
    with pytest.raises(HyLoError, match="attention layers"):
        HyLoConfig.from_architecture(arch.as_teacher())


def test_bad_configs_are_refused():
    for changes, message in [
        (dict(mixers=["mla", "rwkv"]), "rwkv"),
        (dict(mixers=["gdn", "mamba2"]), "one linear kind"),
        (dict(num_hidden_layers=3), "num_hidden_layers"),
        (dict(hidden_act="gelu"), "silu"),
    ]:
        with pytest.raises(HyLoError, match=message):
            tiny_config(**changes)


@pytest.mark.parametrize("first", ["hylo_megatron", "transformers"])
def test_import_registers(first, tmp_path):
    tiny_config().save_pretrained(tmp_path)
    code = f"""
import sys
import {first}
import hylo_megatron
from transformers import AutoConfig, AutoModelForCausalLM
model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained({str(tmp_path)!r}))
assert type(model).__name__ == "HyLoForCausalLM" and "megatron" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("program", ["hylo", "-m hylo_megatron plan"])
def test_import_is_light_in_own_programs(program):
    code = f"""
import sys
sys.argv[0], sys.orig_argv = {program.split()[0]!r}, {["python", *program.split()]!r}
import hylo_megatron
assert not [m for m in ("torch", "transformers", "megatron") if m in sys.modules]
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_import_without_torch_and_transformers():
    code = """
import sys
sys.modules["torch"] = sys.modules["transformers"] = None
import hylo_megatron, hylo_megatron.hf
"""
    subprocess.run([sys.executable, "-c", code], check=True)
