"""Needles: prompts, greedy decoding, and stubs that find or miss them."""

import random
import re

import pytest
import torch
import torch.nn.functional as F
from helpers.evaluation import Stub, copy_number, make_model, make_prose, needles_of, random_hybrid
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import models as hf_models
from hylo_megatron.evaluate.encoding import encode_start, question_text
from hylo_megatron.evaluate.greedy import batches, greedy
from hylo_megatron.evaluate.intervals import wilson
from hylo_megatron.evaluate.needle import ANSWER, FACT, PROMPT, Needle, Prose, first_number, make_needle
from hylo_megatron.evaluate.run_task import answerer
from hylo_megatron.evaluate.task import Prompt


def prompt_text(tokenizer, text: str, key: str) -> str:
    return question_text(tokenizer, PROMPT.format(text=text, key=key), ANSWER.format(key=key))


def test_needles_are_found_by_a_model_that_copies(tokenizer, prose):
    grid = {"lengths": (500, 700), "depths": 3, "samples": 2, "batch_size": 4}
    found = needles_of(Stub(tokenizer, copy_number), tokenizer, prose, **grid)
    assert found["accuracy"] == 1.0 and len(found["samples"]) == 12
    grid_cells = [(length, depth) for length in (500, 700) for depth in (0.0, 0.5, 1.0)]
    assert [(cell["length"], cell["depth"]) for cell in found["cells"]] == grid_cells
    assert len({sample["value"] for sample in found["samples"]}) == 12
    for seed, same in ((0, True), (1, False)):
        again = needles_of(Stub(tokenizer, copy_number), tokenizer, prose, **grid, seed=seed)
        assert (again["samples"] == found["samples"]) is same


@pytest.mark.parametrize(
    "answer_of",
    [
        lambda text: " not mentioned.",
        lambda text: copy_number(text)[:-2] + ".",  # six of seven digits
        lambda text: " 12" + copy_number(text),  # another number first
    ],
)
def test_wrong_answers_are_misses(tokenizer, prose, answer_of):
    found = needles_of(Stub(tokenizer, answer_of), tokenizer, prose, lengths=(500,), depths=2, samples=2)
    assert found["accuracy"] == 0.0 and all(cell["hits"] == 0 for cell in found["cells"])


def test_first_number():
    assert first_number(" 1234567. 7654321") == "1234567"
    assert first_number("1,234,567") == "1234567"
    assert first_number("1234567,890") == "1234567"
    assert first_number("none") == ""


def test_wilson_interval():
    for hits, samples, low, high in ((93, 100, 0.8625, 0.9657), (0, 100, 0.0, 0.0370), (4, 4, 0.5101, 1.0)):
        assert wilson(hits, samples) == pytest.approx((low, high), abs=1e-4)


def test_lengths_are_summed_over_depths(tokenizer, prose):
    """A model that finds what lies in the second half."""

    def answer_of(text):
        return copy_number(text) if text.index("One of the special magic numbers for") > len(text) / 2 else " 7."

    grid = {"lengths": (500, 700), "depths": 4, "samples": 3}
    found = needles_of(Stub(tokenizer, answer_of), tokenizer, prose, **grid)
    low, high = wilson(6, 12)
    rows = [{"hits": 6, "samples": 12, "accuracy": 0.5, "low": low, "high": high, "length": n} for n in (500, 700)]
    assert found["by_length"] == rows and found["accuracy"] == 0.5
    assert [cell["hits"] for cell in found["cells"]] == [0, 0, 3, 3] * 2


@pytest.mark.parametrize("length", [450, 1000, 1900])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("joins", [True, False])
def test_length_and_depth_in_tokens(tokenizer, prose, length, depth, joins):
    haystack = Prose(prose, tokenizer)
    assert haystack.joins
    haystack.joins = joins
    needle = make_needle(haystack, length, depth, random.Random(length))
    assert len(needle.ids) == length - 12  # room for the answer, and no more
    text = tokenizer.decode(list(needle.ids))
    fact = FACT.format(key=needle.key, value=needle.value)
    begin, end = text.index("afterwards.\n") + len("afterwards.\n"), text.index("\nWhat is the special")
    body = text[begin:end]
    assert list(needle.ids) == encode_start(tokenizer, prompt_text(tokenizer, body, needle.key))
    before, after = (len(tokenizer(part).input_ids) for part in body.split(fact))
    sentence = max(haystack.sizes(haystack.sentences))
    assert abs(before / (before + after) - depth) * (before + after) <= sentence / 2 + 3
    assert abs(needle.placed_depth - before / (before + after)) < 0.02
    with pytest.raises(HyLoError, match="too short for the question itself; use"):
        make_needle(haystack, 60, depth, random.Random(0))


def test_tokenizer_that_merges_across_words(tokenizer, prose):
    """Such a one has whole prompts tokenised: joined ids would not be what the model was trained on."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([make_prose()], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    crossing = PreTrainedTokenizerFast(tokenizer_object=raw)
    haystack = Prose(prose, crossing)
    assert not haystack.joins
    needle = make_needle(haystack, 500, 0.5, random.Random(1))
    assert 470 <= len(needle.ids) <= 488
    assert crossing(crossing.decode(list(needle.ids))).input_ids == list(needle.ids)


def test_batches_of_short_prompts_are_padded_and_long_ones_have_one_length(tokenizer):
    model = Stub(tokenizer, None)
    assert list(batches([5, 8, 5, 9, 6], model, 3)) == [[0, 2], [4, 1], [3]]
    assert list(batches([5000, 5001, 5000], model, 9)) == [[0, 2], [1]]
    assert [len(batch) for batch in batches([5] * 100, model, 15)] == [15] * 6 + [10]
    assert [len(batch) for batch in batches([5] * 1400, model, None)] == [700, 700]


def answer_batch(model, tokenizer, needles) -> list[str]:
    answer = answerer(model, tokenizer, Needle(file=None))
    return [text for _, text in sorted(answer(needles))]


def test_decoding_stops_when_every_number_is_over(tokenizer, prose):
    needles = Needle(file=prose, depths=2).prompts(tokenizer, 500, 2, 0)
    answers = {needle.key: f" {needle.value}. And so on" for needle in needles}
    answers[needles[1].key] = ""  # ends at once
    answers[needles[2].key] = " 12,345 and more"
    model = Stub(tokenizer, lambda text: answers[re.search(r"magic number for (\S+) mentioned", text).group(1)])
    found = answer_batch(model, tokenizer, needles)
    assert found[0] == f" {needles[0].value}." and found[1] == "" and found[3] == f" {needles[3].value}."
    assert first_number(found[2]) == "12345" and not found[2].endswith("more")
    longest = max(len(tokenizer(text).input_ids) for text in found)
    assert model.calls == [(4, 488), *[(4, 1)] * (longest - 1)]
    slow = Stub(tokenizer, lambda text: " no number at all, and no end of it, and no end of it, and no end of it")
    answer_batch(slow, tokenizer, needles)
    assert len(slow.calls) == 12


@pytest.mark.parametrize("kind", ["llama", "gdn", "mamba2"])
def test_greedy_equals_generate(tokenizer, prose, kind, monkeypatch):
    model = make_model(tokenizer, initializer_range=0.4) if kind == "llama" else random_hybrid(tokenizer, kind)
    model.generation_config.eos_token_id = None  # twelve tokens, whatever they are
    prompts = [needle.ids for needle in Needle(file=prose, depths=2).prompts(tokenizer, 450, 2, 3)]
    masks, attend = [], F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(query, key, value, attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    found = greedy(model, prompts, 12, lambda ids: False)
    assert masks and all(mask is None for mask in masks)
    monkeypatch.undo()
    for prompt, answer in zip(prompts, found, strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert whole[0, len(prompt) :].tolist() == answer
    assert len({tuple(answer) for answer in found}) > 1, "the prompts make no difference"


def test_prompt_uses_the_chat_template(tokenizer):
    chat = prompt_text(tokenizer, "Text.", "old-key")
    assert chat.startswith("<|user|>Some special") and "provided text?<|assistant|>The special" in chat
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert prompt_text(plain, "Text.", "old-key").startswith("Some special")


@pytest.mark.parametrize("kind", ["llama", "gdn", "mamba2"])
def test_prompts_read_in_chunks_or_with_padding_have_the_same_answers(tokenizer, kind):
    model = make_model(tokenizer, initializer_range=0.4) if kind == "llama" else random_hybrid(tokenizer, kind)
    model.generation_config.eos_token_id = None
    torch.manual_seed(3)
    prompts = [tuple(torch.randint(3, 300, (n,)).tolist()) for n in (90, 90, 70, 33)]
    alone = [greedy(model, [prompt], 6, lambda ids: False)[0] for prompt in prompts]
    assert greedy(model, prompts, 6, lambda ids: False) == alone, "padding changed an answer"
    reads, forward = [], model.forward

    def record(input_ids, **kwargs):
        reads.append(input_ids.shape[1])
        return forward(input_ids=input_ids, **kwargs)

    model.forward = record
    for chunk, pieces in ((32, [32, 32, 26]), (89, [89, 1]), (90, [90]), (1000, [90])):
        reads.clear()
        assert greedy(model, prompts[:2], 6, lambda ids: False, chunk) == alone[:2], f"chunks of {chunk}"
        assert reads == [*pieces, 1, 1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["llama", "gdn", "mamba2"])
def test_chunks_are_small_where_masks_would_be_large(tokenizer, kind, monkeypatch):
    """A prompt of 512K is read in chunks whose mask takes 3 GiB, and chunks leave the logits as they are."""
    assert [hf_models.prefill_chunk(length, None) for length in (600, 32_768)] == [32_768] * 2
    assert [hf_models.prefill_chunk(1 << power, None) for power in (16, 17, 19, 31)] == [16_384, 8192, 2048, 1]
    assert hf_models.prefill_chunk(1 << 19, 4096) == 4096
    assert all(length * hf_models.prefill_chunk(length, None) <= 1 << 30 for length in range(32_769, 1 << 21, 9973))
    model = make_model(tokenizer, initializer_range=0.4) if kind == "llama" else random_hybrid(tokenizer, kind)
    model.generation_config.eos_token_id = None
    prompt = Prompt(ids=tuple(range(3, 93)), length=90, references=())
    reads, logits, forward = [], [], model.forward

    def record(input_ids, **kwargs):
        out = forward(input_ids=input_ids, **kwargs)
        reads.append(input_ids.shape[1])
        logits.append(out.logits[0, -1])
        return out

    model.forward = record
    task = Needle(file=None, max_new_tokens=1)
    list(answerer(model, tokenizer, task)([prompt]))
    monkeypatch.setattr(hf_models, "ONE_PASS", 32)
    for pairs, pieces in ((90 * 40, [32, 32, 26]), (90 * 16, [16] * 5 + [10])):
        monkeypatch.setattr(hf_models, "MASK_PAIRS", pairs)
        reads.clear()
        list(answerer(model, tokenizer, task)([prompt]))
        assert reads == pieces
        torch.testing.assert_close(logits[-1], logits[0], rtol=1e-4, atol=1e-4)


def test_a_length_that_is_let_through_has_room_for_every_prompt(tokenizer, tmp_path):
    """The keys of the prompts decide where a length is about as short as a prompt without filler."""
    file = tmp_path / "prose.txt"
    file.write_text("The zxqvkjwpy met wkzjxqvqp, and pqxzvwkjy met jwvqzkxyq. " * 9)
    task, refused = Needle(file=file, depths=1), 0
    for length in range(200, 400, 8):
        try:
            task.check(tokenizer, length, 4, 0)
        except HyLoError:
            refused += 1
        else:
            assert len(task.prompts(tokenizer, length, 4, 0)) == 4
    assert 0 < refused < 25
