"""Every way in which transformers generates: equal to generation without a cache, or refused."""

import copy

import pytest
import torch
from helpers.hf import HYBRIDS, each_hybrid, model_of, numbers, packed

transformers = pytest.importorskip("transformers")


@each_hybrid
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


@each_hybrid
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
    from helpers.tiny import write_tokenizer

    model_of(("mla", "gdn")).save_pretrained(tmp_path)
    write_tokenizer(tmp_path, 97)
    generator = transformers.pipeline("text-generation", model=str(tmp_path))
    options = dict(max_new_tokens=3, do_sample=False, return_full_text=False)
    texts = ["w5 w6 w7 w8", "w9"]
    alone = [generator(text, **options)[0]["generated_text"] for text in texts]
    generator.tokenizer.pad_token, generator.tokenizer.padding_side = "w0", "left"
    batched = [out[0]["generated_text"] for out in generator(texts, batch_size=2, **options)]
    assert batched == alone and len(alone[0].split()) == 3
