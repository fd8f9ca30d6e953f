"""The exported model among other people's tools: loading, PEFT, accelerate, torch.compile."""

import copy
import os
import subprocess
import sys

import pytest
import torch
from helpers.hf import HYBRIDS, each_hybrid, model_of, numbers
from torch import nn

from hylo_megatron.hf.modeling_hylo import HyLoForCausalLM

transformers = pytest.importorskip("transformers")


# ---- adapters and quantised weights ----


def cached_and_not(model, ids) -> float:
    """Largest difference of the last token's logits, with all but that token cached."""
    with torch.no_grad():
        whole = model(input_ids=ids, use_cache=False).logits[:, -1]
        past = model(input_ids=ids[:, :-1], use_cache=True).past_key_values
        return (model(input_ids=ids[:, -1:], past_key_values=past).logits[:, -1] - whole).abs().max().item()


@each_hybrid
def test_lora_on_every_linear_layer(kind, tmp_path):
    peft = pytest.importorskip("peft")
    base, ids = model_of(**HYBRIDS[kind]), numbers(2, 12)
    plain = base(ids).logits
    config = peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    targets = {name.rsplit(".", 1)[-1] for name in model.targeted_module_names}
    assert {"down_proj", "o_proj" if kind != "mamba2" else "in_proj"} <= targets and "lm_head" not in targets
    assert ("kv_b_proj" in targets) == ("mla" in base.config.mixers)
    adapted = model(input_ids=ids).logits
    assert (adapted - plain).abs().max() > 0.1 and cached_and_not(model, ids) < 1e-3
    options = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=5, do_sample=False)
    want = model.generate(**options, use_cache=False)
    assert torch.equal(model.generate(**options), want)
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path).eval()
    torch.testing.assert_close(loaded(input_ids=ids).logits, adapted)
    merged = model.merge_and_unload()
    assert type(merged) is HyLoForCausalLM and cached_and_not(merged, ids) < 1e-3
    torch.testing.assert_close(merged(ids).logits, adapted, atol=1e-3, rtol=1e-3)


@pytest.mark.parametrize("method", ["PromptTuning", "IA3", "LNTuning", "DoRA", "tokens and head"])
def test_other_adapters_in_cached_decoding(method):
    peft = pytest.importorskip("peft")
    config = {
        "PromptTuning": lambda: peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"),
        "IA3": lambda: peft.IA3Config(target_modules=["kv_b_proj", "down_proj"], feedforward_modules=["down_proj"]),
        "LNTuning": lambda: peft.LNTuningConfig(target_modules=["o_norm", "input_layernorm"]),
        "DoRA": lambda: peft.LoraConfig(target_modules="all-linear", use_dora=True, init_lora_weights=False),
        "tokens and head": lambda: peft.LoraConfig(
            target_modules=["o_proj"], modules_to_save=["embed_tokens", "lm_head"]
        ),
    }[method]()
    base, ids = model_of(("gdn", "mla")), numbers(2, 8)
    model = peft.get_peft_model(copy.deepcopy(base), config).eval()
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.2 * torch.randn_like(parameter)
    options = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
    got = model.generate(**options)
    assert torch.equal(got, model.generate(**options, use_cache=False))
    assert not torch.equal(got, base.generate(**options))
    model(**{"input_ids": ids, "labels": ids}).loss.backward()


def test_prefix_tuning_is_refused():
    peft = pytest.importorskip("peft")
    config = peft.PrefixTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM")
    model, ids = peft.get_peft_model(model_of(("gdn", "mla")), config), numbers(1, 8)
    with pytest.raises(ValueError, match="expected None or a HyLoCache"):
        model(input_ids=ids)
    with pytest.raises(ValueError, match="prefix tuning"):
        model.generate(input_ids=ids, max_new_tokens=2)


def test_adapters_on_convolutions_are_refused():
    peft = pytest.importorskip("peft")
    for linear, target in (("gdn", "k_conv1d"), ("mamba2", "conv1d")):
        config = peft.LoraConfig(r=4, target_modules=[target])
        try:
            model = peft.get_peft_model(model_of(("mla", linear)), config)
        except ValueError:  # PEFT itself wants a rank that the groups divide
            model = model_of(("mla", linear))
            mixer = model.model.layers[1].mixer
            setattr(mixer, target, nn.Sequential(getattr(mixer, target)))
        with pytest.raises(ValueError, match="leave HyLoConv1d layers out"):
            model(input_ids=numbers(1, 5))


def test_hooks_and_subclassed_weights_of_kv_b_proj_are_respected():
    ids = numbers(1, 10)

    def double(layer, args, out):
        return 2 * out

    class Halved(nn.Linear):
        def forward(self, x):
            return super().forward(x) / 2

    class Packed(torch.Tensor):
        """Weights that only ``linear`` unpacks, as quantisers' tensors."""

        @classmethod
        def __torch_function__(cls, function, types, args=(), kwargs=None):
            if function is nn.functional.linear:
                args = (args[0], 2 * args[1].as_subclass(torch.Tensor), *args[2:])
            return super().__torch_function__(function, types, args, kwargs or {})

    for change in ("hook", "class", "parametrized", "replaced forward", "tensor"):
        model = model_of(("mla", "gdn"))
        layer = model.model.layers[0].self_attn.kv_b_proj
        if change == "hook":
            layer.register_forward_hook(double)
        elif change == "class":
            layer.__class__ = Halved
        elif change == "tensor":
            layer.weight = nn.Parameter(layer.weight.data.as_subclass(Packed))
            assert not torch.equal(model(ids).logits, model_of(("mla", "gdn"))(ids).logits)
        elif change == "parametrized":
            nn.utils.parametrizations.weight_norm(layer)
        else:
            layer.forward = lambda x, plain=layer.forward: 3 * plain(x)
        assert cached_and_not(model, ids) < 1e-3, change
    model = torch.ao.quantization.quantize_dynamic(model_of(("mla", "gdn")), {nn.Linear}, dtype=torch.qint8)
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape == (1, 13)


# ---- sizes, dtypes, devices ----


@each_hybrid
def test_resizing_tokens_keeps_the_old_ones(kind):
    model, ids = model_of(**HYBRIDS[kind]), numbers(1, 6)
    want = model(ids).logits
    model.resize_token_embeddings(105)
    out = model(ids, labels=ids)
    assert out.logits.shape[-1] == 105 == model.config.vocab_size and out.loss.isfinite()
    torch.testing.assert_close(out.logits[..., :97], want)
    tied = model.lm_head.weight is model.model.embed_tokens.weight
    assert tied == model.config.tie_word_embeddings


@pytest.mark.parametrize("kind", ["gdn", "mamba2", "qk_norm"])
@torch.no_grad()
def test_half_precision_and_device_maps(kind, tmp_path):
    pytest.importorskip("accelerate")
    model, ids = model_of(**HYBRIDS[kind]), numbers(2, 12)
    model.save_pretrained(tmp_path)
    want = model(ids).logits
    load = transformers.AutoModelForCausalLM.from_pretrained
    for dtype, bound in ((torch.float16, 0.02), (torch.bfloat16, 0.15)):
        half = load(tmp_path, dtype=dtype)
        kept = {name for name, p in half.named_parameters() if p.dtype == torch.float32}
        assert kept and all(name.endswith((".A_log", ".dt_bias", ".D")) for name in kept)
        assert ((half(ids).logits.float() - want).norm() / want.norm()) < bound
        assert {p.dtype for n, p in model.to(dtype).named_parameters() if n not in kept} == {dtype}
        model.float()
    assert torch.equal(load(tmp_path, device_map="auto")(ids).logits, want)
    places = {name: "cpu" for name in ("model.embed_tokens", "model.norm", "lm_head")}
    places |= {f"model.layers.{i}": "disk" if i else "cpu" for i in range(len(model.model.layers))}
    disk = load(tmp_path, device_map=places, offload_folder=tmp_path / "offload")
    assert torch.equal(disk(ids).logits, want)
    assert cached_and_not(disk, ids) < 1e-3


@torch.no_grad()
def test_compile():
    model, ids = model_of(("mla", "gdn")), numbers(2, 12)
    compiled = torch.compile(model, backend="eager")
    torch.testing.assert_close(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


# ---- processes that never imported this package ----

STRANGER = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM, pipeline
assert not any(name.startswith("hylo_megatron") for name in sys.modules)
def message(**options):
    try:
        AutoConfig.from_pretrained(sys.argv[1], **options)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
print(message())
sys.modules["hylo_megatron"] = None  # not installed
print(message(trust_remote_code=True))
del sys.modules["hylo_megatron"]
generator = pipeline("text-generation", model=sys.argv[1], trust_remote_code=True)
print(generator("w5 w6", max_new_tokens=3, do_sample=False)[0]["generated_text"])
generator.model.save_pretrained(sys.argv[1] + "/again")
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1] + "/again")).__module__)
"""


def test_a_process_that_never_imported_the_package(tmp_path):
    from helpers.tiny import hybrid, write_hybrid, write_tokenizer

    from hylo_megatron.convert.megatron_to_hf import convert

    arch = hybrid()
    write_hybrid(tmp_path / "ckpt", arch)
    folder = tmp_path / "hybrid"
    convert(tmp_path / "ckpt", folder)
    write_tokenizer(folder, arch.vocab_size)
    card = (folder / "README.md").read_text()
    assert "import hylo_megatron" in card and "trust_remote_code=True" in card and "vllm serve" in card
    out = subprocess.run(
        [sys.executable, "-c", STRANGER, str(folder)],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path / "home")},
    )
    assert out.returncode == 0, out.stderr
    assert str(folder) in out.stdout and "pass the argument `trust_remote_code=True`" in out.stdout
    assert (
        "ImportError: this folder holds a hybrid" in out.stdout and "install the package hylo-megatron" in out.stdout
    )
    *_, text, module = out.stdout.splitlines()
    assert module == "hylo_megatron.hf.modeling_hylo"
    assert (folder / "again" / "hylo_megatron_loader.py").is_file()
    import hylo_megatron.hf.in_folder as loader

    assert loader.HyLoForCausalLM is HyLoForCausalLM
    generator = transformers.pipeline("text-generation", model=str(folder))
    assert generator("w5 w6", max_new_tokens=3, do_sample=False)[0]["generated_text"] == text
