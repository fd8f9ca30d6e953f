"""Perplexity and loss by position against naive computations."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from helpers.evaluation import (
    make_model,
    make_prose,
    naive_losses,
    random_hybrid,
    write_lines,
)

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.perplexity import long_documents_of, perplexity_of
from hylo_megatron.evaluate.settings import Settings
from hylo_megatron.evaluate.suites import Job


@pytest.mark.parametrize(("chunk", "batch_size"), [(1024, 1), (7, 3), (64, 4)])
def test_perplexity_equals_full_logits(tokenizer, prose, chunk, batch_size):
    model = make_model(tokenizer)
    found = perplexity_of(model, tokenizer, prose, context=300, max_tokens=10**6, chunk=chunk, batch_size=batch_size)
    losses = naive_losses(model, tokenizer, prose, 300)
    expected = torch.cat(losses)
    assert found["tokens"] == len(expected) and found["documents"] == 4
    assert found["perplexity"] == pytest.approx(expected.mean().exp().item(), rel=1e-4)
    assert [(row["from"], row["to"]) for row in found["by_position"]] == [(0, 128), (128, 256), (256, 300)]
    for row in found["by_position"]:  # losses[i][p - 1] is the loss of position p
        part = torch.cat([loss[max(0, row["from"] - 1) : row["to"] - 1] for loss in losses])
        assert (row["tokens"], row["loss"]) == (len(part), pytest.approx(part.mean().item(), rel=1e-4))


def test_perplexity_of_a_uniform_model_is_the_vocabulary(tokenizer, prose):
    model = make_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity_of(model, tokenizer, prose)["perplexity"] == pytest.approx(len(tokenizer), rel=1e-4)
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(HyLoError, match="not a finite number"):
        perplexity_of(model, tokenizer, prose)


def test_perplexity_stops_at_the_token_budget(tokenizer, prose):
    model = make_model(tokenizer)
    found = perplexity_of(model, tokenizer, prose, context=64, max_tokens=100)
    first, second, *_ = naive_losses(model, tokenizer, prose, 64)
    assert found["tokens"] == 100 and found["documents"] == 2
    expected = torch.cat([first, second[:37]])
    assert found["loss"] == pytest.approx(expected.mean().item(), rel=1e-4)


def test_perplexity_of_whole_documents_takes_every_window(tokenizer, tmp_path):
    model, text = make_model(tokenizer), " ".join(f"word {i}" for i in range(90))
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text}) + "\n")
    ids = tokenizer(text).input_ids
    cut = perplexity_of(model, tokenizer, tmp_path / "book.jsonl", context=64)
    whole = perplexity_of(model, tokenizer, tmp_path / "book.jsonl", context=64, whole=True)
    windows = -(-len(ids) // 64)
    assert cut["documents"] == 2 and whole["documents"] == 2 * windows
    assert whole["tokens"] == 2 * (len(ids) - windows)
    some = perplexity_of(model, tokenizer, tmp_path / "book.jsonl", context=64, max_tokens=100, whole=True)
    assert some["tokens"] == 100 and some["documents"] == 2


def test_long_documents(tokenizer, tmp_path):
    texts = [make_prose(seed, sentences) for seed, sentences in ((0, 60), (1, 3), (2, 50), (3, 2), (4, 70))]
    file = write_lines(tmp_path / "long.jsonl", [{"text": text} for text in texts])
    model = make_model(tokenizer)
    found = long_documents_of(model, tokenizer, file, context=600, count=2, chunk=64)
    losses = [naive_losses(model, tokenizer, file, 600)[i] for i in (0, 2)]
    assert found["documents"] == 2 and found["tokens"] == 2 * 599
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert [row["from"] for row in found["by_position"]] == [0, 128, 256, 512]
    assert long_documents_of(model, tokenizer, file, context=600, count=9)["documents"] == 3
    short = write_lines(tmp_path / "short.jsonl", [{"text": text} for text in texts[1:4]])
    joined = long_documents_of(model, tokenizer, short, context=600, count=2, join=True)
    whole = write_lines(tmp_path / "whole.jsonl", [{"text": "\n\n".join(texts[1:4])}])
    assert joined["loss"] == pytest.approx(long_documents_of(model, tokenizer, whole, context=600)["loss"], rel=1e-5)
    assert joined["documents"] == 1
    with pytest.raises(HyLoError, match="no document of 100,000 tokens"):
        long_documents_of(model, tokenizer, file, context=100_000)


@pytest.mark.parametrize("kind", ["llama", "gdn", "mamba2"])
@pytest.mark.parametrize("prefill", [1, 64, 299, 300, 5000])
def test_documents_read_in_chunks_have_the_same_losses(tokenizer, prose, kind, prefill):
    model = make_model(tokenizer) if kind == "llama" else random_hybrid(tokenizer, kind)
    settings = {"context": 12, "max_tokens": 20} if prefill == 1 else {"context": 300, "max_tokens": 700}
    whole = perplexity_of(model, tokenizer, prose, **settings)
    found = perplexity_of(model, tokenizer, prose, **settings, prefill=prefill)
    assert found["loss"] == pytest.approx(whole["loss"], rel=1e-4)
    for row, expected in zip(found["by_position"], whole["by_position"], strict=True):
        assert row["loss"] == pytest.approx(expected["loss"], rel=1e-3)


@pytest.mark.parametrize("chosen, chunk", [(None, 2048), (4096, 4096)])
def test_long_documents_are_read_in_chunks_with_small_masks(prose, chosen, chunk):
    loaded = SimpleNamespace(model=None, tokenizer=None)
    job = Job(role="model", loaded=loaded, files={"long": (prose,)}, settings=Settings(prefill_chunk=chosen))
    assert job.losses(lambda *_, **how: how, "long", "long documents", context=1 << 19)["prefill"] == chunk


def test_intervals_are_those_of_documents(tokenizer, prose):
    model = make_model(tokenizer)
    found = perplexity_of(model, tokenizer, prose, context=300)
    losses = found["document_losses"]
    assert sum(tokens for tokens, _ in losses) == found["tokens"] and len(losses) == found["documents"] == 4
    assert sum(loss for _, loss in losses) / found["tokens"] == pytest.approx(found["loss"], rel=1e-5)
    assert found["low"] < found["perplexity"] < found["high"]
    one = perplexity_of(model, tokenizer, prose, context=64, max_tokens=30)
    assert one["low"] == pytest.approx(one["perplexity"]) == one["high"]
