"""The exported model's inputs: packed documents, masks, positions, and arguments of other tools."""

import itertools

import pytest
import torch
from helpers.hf import HYBRIDS, each_hybrid, model_of, numbers, packed
from hypothesis import given, settings
from hypothesis import strategies as st

from hylo_megatron.hf.cache import HyLoCache

LENGTHS = (5, 1, 21, 7)


def offsets(lengths) -> torch.Tensor:
    return torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)


def alone(model, ids: torch.Tensor, lengths) -> torch.Tensor:
    """Logits of a packed row's documents, each run by itself."""
    return torch.cat([model(part, use_cache=False).logits for part in ids.split(lengths, 1)], 1)


@each_hybrid
@pytest.mark.parametrize("how", ["position_ids", "cu_seq_lens", "cu_seq_lens and positions", "seq_idx", "counted on"])
def test_packed_documents_are_computed_as_if_alone(kind, how):
    model, lengths = model_of(**HYBRIDS[kind]), LENGTHS
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

    model, lengths = model_of(("mla", "gdn")), LENGTHS
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
        with pytest.raises(ValueError, match=message):
            model(numbers(1, 8), past_key_values=HyLoCache(2), position_ids=packed([3, 5]))
        for arguments in (dict(position_ids=packed([3, 5])), dict(cu_seq_lens_q=torch.tensor([0, 3, 8]))):
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
