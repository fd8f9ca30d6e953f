"""The exported model among other people's tools: generate, Trainer, PEFT, accelerate, FSDP, torch.compile."""

import copy
import itertools
import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_hf_model import HYBRIDS, each_hybrid, model_of
from torch import nn

from hylo_megatron.hf.cache import HyLoCache
from hylo_megatron.hf.modeling_hylo import HyLoForCausalLM

transformers = pytest.importorskip("transformers")

LENGTHS = [(5, 1, 21, 7), (34,), (16, 18), (1, 1, 32)]


def numbers(rows: int, length: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(2, 97, (rows, length), generator=torch.Generator().manual_seed(seed))


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def packed(lengths) -> torch.Tensor:
    return torch.cat([torch.arange(length) for length in lengths])[None]


def alone(model, ids: torch.Tensor, lengths) -> torch.Tensor:
    """Logits of a packed row's documents, each run by itself."""
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)


# ---- packed sequences ----


@each_hybrid
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "cu_seq_lens and positions", "seq_idx", "counted on"])
def test_packed_documents_are_computed_as_if_alone(kind, how):
    model, lengths = model_of(**HYBRIDS[kind]), LENGTHS[0]
    ids, ends = numbers(1, sum(lengths)), offsets(lengths)
    given_ends = dict(cu_seq_lens_q=ends, cu_seq_lens_k=ends, max_length_q=21, max_length_k=21)
    given_index = dict(seq_idx=torch.arange(len(lengths), dtype=torch.int32).repeat_interleave(ends.diff())[None])
    arguments = {
        "position_ids": dict(position_ids=packed(lengths)),
        "cu_seq_lens": given_ends,
        "cu_seq_lens and positions": dict(position_ids=packed(lengths), **given_ends, **given_index),
        "seq_idx": given_index,
        "counted on": dict(position_ids=torch.arange(sum(lengths))[None], **given_ends),
    }[how]
    want = alone(model, ids, lengths)
    want.square().mean().backward()
    gradients = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.zero_grad()
    got = model(ids, **arguments).logits
    torch.testing.assert_close(got, want, atol=1e-4, rtol=0)
    got.square().mean().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-4, rtol=1e-3, msg=name)


@settings(max_examples=25, deadline=None)
@given(
    rows=st.lists(st.lists(st.integers(1, 40), min_size=1, max_size=4), min_size=1, max_size=3),
    left=st.integers(0, 3),
)
@torch.no_grad()
def test_packed_rows_of_any_lengths_and_padding(rows, left):
    model, width = model_of(("gdn", "mla")), max(map(sum, rows)) + left
    ids, mask, positions = (
        numbers(len(rows), width),
        torch.zeros(len(rows), width),
        torch.zeros(len(rows), width).long(),
    )
    for i, lengths in enumerate(rows):
        end = left + sum(lengths)
        mask[i, left:end], positions[i, left:end] = 1, packed(lengths)
    got = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    for i, lengths in enumerate(rows):
        span = slice(left, left + sum(lengths))
        torch.testing.assert_close(
            got[i : i + 1, span], alone(model, ids[i : i + 1, span], lengths), atol=1e-4, rtol=0
        )


def test_flattening_collator_gives_the_loss_of_the_documents():
    from transformers import DataCollatorWithFlattening

    model, lengths = model_of(("mla", "gdn")), LENGTHS[0]
    documents = [ids.tolist() for ids in numbers(1, sum(lengths))[0].split(lengths)]
    batch = DataCollatorWithFlattening(return_flash_attn_kwargs=True, return_seq_idx=True)(
        [{"input_ids": ids} for ids in documents]
    )
    want = sum(
        model(torch.tensor([ids]), labels=torch.tensor([ids])).loss * (len(ids) - 1)
        for ids in documents
        if len(ids) > 1
    )
    torch.testing.assert_close(model(**batch, num_items_in_batch=1).loss, want)


REFUSED_PACKING = {
    "goes from 4 to 9": dict(position_ids=torch.tensor([[0, 1, 2, 3, 4, 9, 10, 11]])),
    "goes from 4 to 2": dict(position_ids=torch.tensor([[0, 1, 2, 3, 4, 2, 3, 4]])),
    "position_ids has shape": dict(position_ids=torch.arange(7)[None]),
    "rise from 0 to the 8": dict(cu_seq_lens_q=torch.tensor([0, 5, 9])),
    "rise from 0 to the 8 tokens": dict(cu_seq_lens_q=torch.tensor([0, 5, 3, 8])),
    "cu_seq_lens_q and cu_seq_lens_k differ": dict(
        cu_seq_lens_q=torch.tensor([0, 5, 8]), cu_seq_lens_k=torch.tensor([0, 4, 8])
    ),
    "give one of them": dict(cu_seq_lens_q=torch.tensor([0, 5, 8]), seq_idx=torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1]])),
    "start no document": dict(cu_seq_lens_q=torch.tensor([0, 5, 8]), position_ids=packed([3, 5])),
    "seq_idx has shape": dict(seq_idx=torch.zeros(8)),
    "packed documents cannot be cached": dict(position_ids=packed([3, 5]), use_cache=True),
    "padding inside a packed document": dict(
        position_ids=torch.tensor([[0, 1, 0, 1, 2, 0, 3, 4]]), attention_mask=torch.tensor([[1, 1, 1, 1, 1, 0, 1, 1]])
    ),
    "values other than 0 and 1": dict(attention_mask=torch.tensor([[1, 1, 1, 2, 2, 2, 2, 2]])),
    "padding between real tokens": dict(attention_mask=torch.tensor([[1, 1, 1, 0, 1, 1, 1, 1]])),
    "attention_mask has shape": dict(attention_mask=torch.ones(1, 1, 8, 8)),
    "output_attentions is not supported": dict(output_attentions=True),
    "is_causal=False": dict(is_causal=False),
    "token_type_ids": dict(token_type_ids=torch.ones(1, 8)),
    "argument head_mask is not known": dict(head_mask=torch.ones(2, 4)),
    "HyLoCache has 3 layers": dict(past_key_values=HyLoCache(3)),
}


@pytest.mark.parametrize("message", REFUSED_PACKING)
def test_arguments_that_would_be_wrong_are_refused(message):
    model = model_of(("mla", "gdn"))
    with pytest.raises(ValueError, match=message):
        model(numbers(1, 8), **REFUSED_PACKING[message])
    if message == "packed documents cannot be cached":
        past = model(numbers(1, 8), use_cache=True).past_key_values
        for arguments in (dict(position_ids=packed([3, 5]) + 0), dict(cu_seq_lens_q=torch.tensor([0, 3, 8]))):
            with pytest.raises(ValueError, match=message):
                model(numbers(1, 8), past_key_values=past, **arguments)
        with pytest.raises(ValueError, match="holds 1 sequences"):
            model(numbers(2, 1), past_key_values=past)


@torch.no_grad()
def test_arguments_of_other_tools_without_effect_are_accepted():
    model, ids = model_of(("mla", "gdn")), numbers(2, 8)
    want = model(ids).logits
    got = model(ids, token_type_ids=torch.zeros_like(ids), is_causal=True, output_router_logits=None, head_mask=None,
                output_attentions=False, position_ids=torch.arange(8)[None])  # fmt: skip
    assert torch.equal(got.logits, want)
    assert torch.equal(model(ids, position_ids=torch.arange(5, 13)[None]).logits.argmax(-1), want.argmax(-1))
    as_tuple = model(ids, labels=ids, return_dict=False, use_cache=False)
    assert len(as_tuple) == 2 and torch.equal(as_tuple[1], want)
    model.config.output_hidden_states = True
    assert len(model(ids).hidden_states) == 3
    assert len(model.model(ids, return_dict=False, use_cache=False)) == 2


# ---- generate ----


@pytest.mark.parametrize("kind", ["gdn", "mamba2", "qk_norm"])
@torch.no_grad()
def test_every_way_to_generate_equals_the_uncached_one(kind):
    model, ids = model_of(**HYBRIDS[kind]), numbers(2, 9)
    mask = torch.ones_like(ids)
    options = dict(attention_mask=mask, max_new_tokens=6, do_sample=False)
    want = model.generate(ids, use_cache=False, **options)
    for more in (dict(), dict(prefill_chunk_size=4), dict(prefill_chunk_size=1), dict(cache_implementation="dynamic")):
        assert torch.equal(model.generate(ids, **options, **more), want), more
    embeddings = model.get_input_embeddings()(ids)
    assert torch.equal(model.generate(inputs_embeds=embeddings, **options), want[:, 9:])
    for more in (dict(num_beams=3, num_return_sequences=2), dict(guidance_scale=1.5), dict(repetition_penalty=1.3)):
        uncached = model.generate(ids, use_cache=False, **options, **more)
        assert torch.equal(model.generate(ids, **options, **more), uncached), more
    samples = []
    for cached in (True, False):
        torch.manual_seed(1)
        samples.append(model.generate(ids, **{**options, "do_sample": True}, num_return_sequences=2, use_cache=cached))
    assert torch.equal(*samples)


@pytest.mark.parametrize("kind", ["gdn", "mamba2"])
@torch.no_grad()
def test_a_returned_cache_goes_on(kind):
    """Another turn of a conversation, with left padding in one row."""
    model, ids = model_of(**HYBRIDS[kind]), numbers(2, 9)
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    options = dict(max_new_tokens=4, do_sample=False)
    first = model.generate(ids, attention_mask=mask, return_dict_in_generate=True, **options)
    longer = torch.cat([first.sequences, numbers(2, 5, seed=1)], 1)
    longer_mask = torch.cat([mask, torch.ones(2, longer.shape[1] - 9, dtype=mask.dtype)], 1)
    got = model.generate(longer, attention_mask=longer_mask, past_key_values=first.past_key_values, **options)
    assert torch.equal(got, model.generate(longer, attention_mask=longer_mask, use_cache=False, **options))
    assert torch.equal(got[:1, 4:], model.generate(longer[:1, 4:], use_cache=False, **options))


@torch.no_grad()
def test_ways_to_generate_that_states_forbid_are_refused():
    model, ids = model_of(("mla", "gdn")), numbers(1, 9)
    ends_in_padding = torch.ones(2, 9, dtype=torch.long)
    ends_in_padding[1, -2:] = 0
    cases = [
        ("stateful models", dict(prompt_lookup_num_tokens=2)),
        ("stateful models", dict(assistant_model=copy.deepcopy(model))),
        *(("cache_implementation", dict(cache_implementation=kind)) for kind in ("static", "offloaded", "quantized")),
        ("serve with vLLM", dict(cache_implementation="paged")),
        ("no attention weights", dict(output_attentions=True, return_dict_in_generate=True)),
        ("give no inputs_embeds", dict(inputs_embeds=model.get_input_embeddings()(ids), prefill_chunk_size=3)),
        ("padding_side", dict(inputs=numbers(2, 9), attention_mask=ends_in_padding)),
        ("packed documents", dict(position_ids=packed([4, 5]))),
    ]
    for message, options in cases:
        options = {"max_new_tokens": 3, "do_sample": False, **options}
        inputs = {} if {"inputs", "inputs_embeds"} & set(options) else {"inputs": ids}
        with pytest.raises(ValueError, match=message):
            model.generate(**inputs, **options)
    llama = transformers.AutoModelForCausalLM.from_config(
        transformers.LlamaConfig(vocab_size=97, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
                                 num_attention_heads=2, bos_token_id=1, eos_token_id=None, pad_token_id=0)
    )  # fmt: skip
    with pytest.raises(ValueError, match="cannot be an assistant_model"):
        llama.generate(ids, assistant_model=model, max_new_tokens=3, do_sample=False)


def test_pipeline(tmp_path):
    from tiny import write_tokenizer

    model_of(("mla", "gdn")).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, 97)
    generator = transformers.pipeline("text-generation", model=str(tmp_path))
    options = dict(max_new_tokens=3, do_sample=False, return_full_text=False)
    texts = ["w5 w6 w7 w8", "w9"]
    alone = [generator(text, **options)[0]["generated_text"] for text in texts]
    generator.tokenizer.pad_token, generator.tokenizer.padding_side = "w0", "left"
    batched = [out[0]["generated_text"] for out in generator(texts, batch_size=2, **options)]
    assert batched == alone and len(alone[0].split()) == 3


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


def test_lora_on_bf16_weights_under_fsdp2(one_process):
    """FSDP2 wants one dtype among the trained parameters only."""
    peft = pytest.importorskip("peft")
    model, ids = model_of(("gdn", "mla", "mla")).bfloat16(), numbers(2, 12)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules="all-linear")).train()
    want = model(input_ids=ids, labels=ids).loss.item()
    fsdp2(model.base_model.model, False)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    assert loss.item() == pytest.approx(want, rel=1e-4)


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


# ---- training ----


def trained(model, tmp_path, **options):
    """The losses of two steps of ``Trainer``, each of two micro-batches, and the parameters after them."""
    from transformers import Trainer, TrainingArguments

    rows = [{"input_ids": row, "labels": row} for row in numbers(4, 12)]
    arguments = TrainingArguments(
        str(tmp_path), use_cpu=True, max_steps=2, per_device_train_batch_size=2, gradient_accumulation_steps=2,
        report_to=[], save_strategy="no", logging_steps=1, learning_rate=1e-3, disable_tqdm=True, **options,
    )  # fmt: skip
    trainer = Trainer(model=model, args=arguments, train_dataset=rows)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return losses, {name: p.detach().clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["gdn", "mamba2"])
def test_trainer_with_and_without_gradient_checkpointing(kind, tmp_path):
    pytest.importorskip("accelerate")
    ids = numbers(4, 12)
    want = model_of(**HYBRIDS[kind])(ids, labels=ids).loss.item()
    plain, parameters = trained(model_of(**HYBRIDS[kind]), tmp_path)
    again, others = trained(model_of(**HYBRIDS[kind]), tmp_path, gradient_checkpointing=True)
    assert plain == again and plain[1] < plain[0] and plain[0] == pytest.approx(want, rel=1e-4)
    for name, parameter in parameters.items():
        torch.testing.assert_close(parameter, others[name])
    mixed, kept = trained(model_of(**HYBRIDS[kind]), tmp_path, bf16=True)
    assert mixed == pytest.approx(plain, rel=0.02) and {p.dtype for p in kept.values()} == {torch.float32}


def test_a_cache_under_gradient_checkpointing_is_refused():
    model, ids = model_of(("mla", "gdn")), numbers(1, 6)
    past = model(ids, use_cache=True).past_key_values
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gradient checkpointing"):
        model(ids, past_key_values=past)
    during_training = model.generate(ids, max_new_tokens=4, do_sample=False)  # without gradients nothing is recomputed
    assert torch.equal(during_training, model.eval().generate(ids, max_new_tokens=4, do_sample=False))


@pytest.fixture
def one_process():
    import torch.distributed as dist

    dist.init_process_group("gloo", rank=0, world_size=1, store=dist.HashStore())
    yield
    dist.destroy_process_group()


def fsdp1(model, mixed: bool):
    from torch.distributed.fsdp import FullyShardedDataParallel, MixedPrecision
    from torch.distributed.fsdp.wrap import ModuleWrapPolicy

    policy = ModuleWrapPolicy({type(model.model.layers[0])})
    precision = MixedPrecision(torch.bfloat16, torch.float32, torch.bfloat16) if mixed else None
    return FullyShardedDataParallel(
        model, auto_wrap_policy=policy, use_orig_params=True, mixed_precision=precision, device_id=torch.device("cpu")
    )


def fsdp2(model, mixed: bool):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if mixed else MixedPrecisionPolicy()
    mesh = init_device_mesh("cpu", (1,))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    return fully_shard(model, mesh=mesh, mp_policy=policy)


@pytest.mark.parametrize("kind", ["gdn", "mamba2"])
@pytest.mark.parametrize("wrap", [fsdp1, fsdp2])
def test_one_step_under_fsdp(kind, wrap, one_process):
    """Loaded in fp32, as for mixed precision; ``A_log``, ``dt_bias`` and ``D`` are fp32 in every other dtype too."""
    ids = numbers(2, 12)
    for mixed, checkpointed in ((False, False), (False, True), (True, False)):
        reference = model_of(**HYBRIDS[kind]).train()
        model = wrap(copy.deepcopy(reference), mixed)
        if checkpointed:
            getattr(model, "module", model).gradient_checkpointing_enable()
        losses = []
        for each in (reference, model):
            optimizer = torch.optim.SGD(each.parameters(), 1e-2)
            for _ in range(2):
                optimizer.zero_grad()
                loss = each(ids, labels=ids, position_ids=packed([5, 7]).expand(2, -1)).loss
                loss.backward()
                losses.append(loss.item())
                optimizer.step()
        assert losses[2:] == pytest.approx(losses[:2], rel=0.02 if mixed else 1e-5) and losses[1] < losses[0]
    with pytest.raises((ValueError, AssertionError), match="uniform"):
        wrap(model_of(**HYBRIDS[kind]).bfloat16().train(), False)(ids)


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
    from tiny import hybrid, write_hybrid, write_tokenizer

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
