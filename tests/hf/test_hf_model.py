"""The transformers model: caches, padding, gradients, files and imports."""

import subprocess
import sys
import weakref

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from helpers.hf import HYBRIDS, LLAMA3, each_hybrid, model_of, tiny_config
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hylo_megatron  # noqa: F401  (registers the model)
from hylo_megatron.config import Architecture, geometry_preset
from hylo_megatron.errors import HyLoError
from hylo_megatron.hf.cache import HyLoCache
from hylo_megatron.hf.configuration_hylo import HyLoConfig
from hylo_megatron.hf.modeling_hylo import HyLoForCausalLM

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


@each_hybrid
@torch.no_grad()
def test_a_token_takes_the_bytes_that_are_counted(kind):
    """MLA rows grow by R + P bf16 values a token, states not at all, windows until they are full."""
    model, sizes = model_of(**HYBRIDS[kind]).bfloat16(), []
    for length in (16, 17):
        sizes.append(model(torch.ones(1, length, dtype=torch.long), use_cache=True).past_key_values.num_bytes())
    assert sizes[1] - sizes[0] == model.config.to_architecture().kv_bytes_per_token()
    assert sizes[1] - sizes[0] == model.config.mixers.count("mla") * 2 * (20 + 8)


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


def test_foreign_caches_and_masks_are_refused():
    from transformers import DynamicCache

    model, ids = model_of(("gdn",)), torch.ones(1, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="HyLoCache"):
        model(ids, past_key_values=DynamicCache())
    with pytest.raises(ValueError, match="attention_mask"):
        model(ids, attention_mask=torch.ones(1, 3))


PADDED = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("kind", ["linear_rope", "window", "nope", "qk_norm"])
@torch.no_grad()
def test_masks_and_positions_go_on_from_the_cached_ones(kind, masked):
    """Positions of another origin go on by themselves; what would compute with two origins is refused."""
    options = dict(attention_mask=PADDED) if masked else dict(position_ids=torch.arange(5, 17).expand(2, -1))
    model, ids = model_of(**HYBRIDS[kind]), torch.randint(2, 97, (2, 12))
    whole = model(ids, use_cache=False, **options).logits.flip(0)
    first = {name: tensor[:, :8] for name, tensor in options.items()}
    cache = model(ids[:, :8], use_cache=True, **first).past_key_values
    cache.reorder_cache(torch.tensor([1, 0]))
    ids, mask = ids.flip(0), (PADDED if masked else torch.ones_like(ids)).flip(0)
    for at in (7, 14):
        with pytest.raises(ValueError, match="position_ids.*which follows the cached tokens"):
            spans = torch.arange(at, at + 2).expand(2, -1)
            model(ids[:, 8:10], past_key_values=cache, attention_mask=mask[:, :10], position_ids=spans)
    other = [dict(), dict(attention_mask=PADDED[:, 2:])] if masked else [dict(attention_mask=PADDED[:, :10].flip(0))]
    for changes in other:
        with pytest.raises(ValueError, match="attention_mask pads other cached tokens"):
            model(ids[:, 8:10], past_key_values=cache, **changes)
    parts = [model(ids[:, 8:10], past_key_values=cache, attention_mask=mask[:, :10]).logits]
    parts.append(model(ids[:, 10:], past_key_values=cache, attention_mask=mask).logits)
    torch.testing.assert_close(torch.cat(parts, 1), whole[:, 8:], atol=1e-4, rtol=0)
    cache.reset()
    torch.testing.assert_close(model(ids, past_key_values=cache).logits, model(ids).logits)


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


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(linear_rope=True), "linear_rope is True, but the plan has linear layers without queries"),
        (dict(mla_rope="off"), "field mla_rope is 'off'"),
        (dict(log_scale={"base": 0.0, "length": 1}), "log_scale is .* expected numbers of 0 or more"),
        (dict(window={"size": 0, "sinks": 1}), "field window.size is 0"),
    ],
)
def test_fields_that_from_pretrained_changes_are_checked(changes, message, tmp_path):
    model_of(("mla", "mamba2")).save_pretrained(tmp_path)
    assert HyLoForCausalLM.from_pretrained(tmp_path, mla_rope=False).config.mla_rope is False
    with pytest.raises(HyLoError, match=message):
        HyLoForCausalLM.from_pretrained(tmp_path, **changes)


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
