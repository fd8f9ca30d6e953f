"""Needle retrieval: one fact in a haystack of prose, asked for at the end, decoded freely, scored by its number."""

import random
import re
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.perplexity import rows_per_batch
from hylo_megatron.evaluate.texts import key_words, read_some, sentences_of

FACT = "One of the special magic numbers for {key} is: {value}."
PROMPT = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n{text}\n"
    "What is the special magic number for {key} mentioned in the provided text?"
)
ANSWER = "The special magic number for {key} mentioned in the provided text is"
MAX_NEW_TOKENS = 12
HAYSTACK_CHARS = 2_000_000


@dataclass(frozen=True)
class Needle:
    """One prompt. ``length``: tokens of prompt and answer together at most; ``depth``: 0 first, 1 last in the text."""

    length: int
    depth: float
    placed_depth: float  # where a sentence boundary allowed the fact to go, measured in tokens
    key: str
    value: str
    ids: tuple[int, ...]


class Haystack:
    """Sentences of a prose file with their token counts, and the words that keys are made of."""

    def __init__(self, file: str | Path, tokenizer: PreTrainedTokenizerBase):
        prose = read_some(file, HAYSTACK_CHARS)
        self.tokenizer = tokenizer
        self.sentences = sentences_of(prose)
        if not self.sentences:
            raise HyLoError(f"{file} has no sentences to hide a needle in: expected prose")
        self.adjectives, self.nouns = key_words(prose)
        self.lengths = [self.count(sentence) for sentence in self.sentences]

    def count(self, text: str) -> int:
        """Tokens of a text that follows other text."""
        return len(self.tokenizer(" " + text, add_special_tokens=False, verbose=False).input_ids)

    def take(self, start: int, budget: int) -> list[tuple[str, int]]:
        """Sentences from ``start`` on (round and round if need be) with their tokens; the last is cut to fit."""
        taken, index = [], start % len(self.sentences)
        while budget >= self.lengths[index]:
            taken.append((self.sentences[index], self.lengths[index]))
            budget -= self.lengths[index]
            index = (index + 1) % len(self.sentences)
        words = self.sentences[index].split()
        while words and self.count(" ".join(words)) > budget:
            words.pop()
        return [*taken, (" ".join(words), self.count(" ".join(words)))] if words else taken


def depths_of(count: int) -> list[float]:
    """``count`` depths from the first to the last place; one alone is the middle."""
    return [0.5] if count == 1 else [index / (count - 1) for index in range(count)]


def place(filler: list[tuple[str, int]], fact: str, depth: float) -> tuple[str, float]:
    """The text with the fact at the sentence boundary nearest to ``depth`` in tokens, and that boundary's depth."""
    starts = [0]
    for _, tokens in filler:
        starts.append(starts[-1] + tokens)
    total = max(1, starts[-1])
    at = min(range(len(starts)), key=lambda index: abs(starts[index] - depth * total))
    sentences = [sentence for sentence, _ in filler]
    return " ".join([*sentences[:at], fact, *sentences[at:]]), starts[at] / total


def encode_prompt(tokenizer: PreTrainedTokenizerBase, text: str, key: str) -> list[int]:
    """Question and beginning of the answer, in the chat format where the tokenizer has one."""
    question, answer = PROMPT.format(text=text, key=key), ANSWER.format(key=key)
    if not tokenizer.chat_template:
        return tokenizer(f"{question}\n{answer}", verbose=False).input_ids
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return tokenizer(chat + answer, add_special_tokens=False, verbose=False).input_ids


def make_needle(haystack: Haystack, length: int, depth: float, rng: random.Random) -> Needle:
    """A prompt that leaves room for the answer within ``length`` tokens and wastes only a word or so of it."""
    key = f"{rng.choice(haystack.adjectives)}-{rng.choice(haystack.nouns)}"
    value = str(rng.randint(1_000_000, 9_999_999))
    fact, start = FACT.format(key=key, value=value), rng.randrange(len(haystack.sentences))
    room = length - MAX_NEW_TOKENS
    budget = room - len(encode_prompt(haystack.tokenizer, fact, key))
    while budget >= 0:
        text, placed = place(haystack.take(start, budget), fact, depth)
        ids = encode_prompt(haystack.tokenizer, text, key)
        if len(ids) <= room:
            return Needle(length, depth, placed, key, value, tuple(ids))
        budget -= len(ids) - room
    raise HyLoError(f"needle length {length} is too short for the question itself: use {length - budget + 32} or more")


def make_needles(haystack: Haystack, lengths: Iterable[int], depths: int, samples: int, seed: int) -> list[Needle]:
    """``samples`` prompts for every length and depth; each has its own seed, so no cell depends on the others."""
    return [
        make_needle(haystack, length, depth, random.Random(f"{seed}/{length}/{depth:.4f}/{sample}"))
        for length in lengths
        for depth in depths_of(depths)
        for sample in range(samples)
    ]


def first_number(text: str) -> str:
    """The first run of digits, thousands separators removed; empty if there is none."""
    found = re.search(r"\d{1,3}(?:,\d{3})+|\d+", text)
    return found.group().replace(",", "") if found else ""


def answer_batch(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, needles: list[Needle]) -> list[str]:
    """Greedy continuations; prompts are padded on the left."""
    width = max(len(needle.ids) for needle in needles)
    pad = next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)
    ids = torch.full((len(needles), width), pad)
    mask = torch.zeros_like(ids)
    for row, needle in enumerate(needles):
        ids[row, width - len(needle.ids) :] = torch.tensor(needle.ids)
        mask[row, width - len(needle.ids) :] = 1
    out = model.generate(
        input_ids=ids.to(model.device),
        attention_mask=mask.to(model.device),
        max_new_tokens=MAX_NEW_TOKENS,
        do_sample=False,
        pad_token_id=pad,
    )
    return tokenizer.batch_decode(out[:, width:], skip_special_tokens=True)


def summarize(results: list[dict]) -> list[dict]:
    """Hits of every (length, depth) cell, in order of first appearance."""
    cells = {}
    for result in results:
        cell = cells.setdefault(
            (result["length"], result["depth"]),
            {"length": result["length"], "depth": result["depth"], "hits": 0, "samples": 0},
        )
        cell["hits"] += result["hit"]
        cell["samples"] += 1
    return [{**cell, "accuracy": cell["hits"] / cell["samples"]} for cell in cells.values()]


@torch.inference_mode()
def needles_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    lengths: Iterable[int] = (1024, 2048),
    depths: int = 5,
    samples: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
    label: str = "",
) -> dict:
    """Retrieval over depth x length; ``samples`` prompts a cell. Returns accuracy (of 1), cells, samples, seconds."""
    if depths < 1 or samples < 1:
        raise HyLoError(f"{depths} depths and {samples} samples of needles: expected at least 1 of each")
    began, results = time.perf_counter(), []
    needles = make_needles(Haystack(file, tokenizer), lengths, depths, samples, seed)
    while len(results) < len(needles):
        todo = needles[len(results) :]
        rows = rows_per_batch(todo[0].length, model.device, batch_size)
        batch = [needle for needle in todo[:rows] if needle.length == todo[0].length]
        for needle, answer in zip(batch, answer_batch(model, tokenizer, batch), strict=True):
            fields = {name: getattr(needle, name) for name in ("length", "depth", "placed_depth", "key", "value")}
            hit = first_number(answer) == needle.value
            results.append({**fields, "prompt_tokens": len(needle.ids), "answer": answer, "hit": hit})
        if label:
            hits, seconds = sum(result["hit"] for result in results), time.perf_counter() - began
            print(f"{label}: {len(results)}/{len(needles)} prompts, {hits} found, {seconds:.0f} s", flush=True)
    return {
        "accuracy": sum(result["hit"] for result in results) / max(1, len(results)),
        "cells": summarize(results),
        "samples": results,
        "seconds": round(time.perf_counter() - began, 2),
    }
