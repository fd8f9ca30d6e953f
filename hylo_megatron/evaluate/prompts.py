"""Prompts of the needle test: one fact hidden in prose, a question after it; all prompts of a length equally long.

A prompt is put together from token ids that its sentences already have, so that 32K tokens of it cost no tokenising.
"""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hylo_megatron.errors import HyLoError
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
PLACEHOLDER = "THE-TEXT-GOES-HERE"
FILL_WORDS = 200  # words tried to fill a prompt up to its last token
ATTEMPTS = 6


@dataclass(frozen=True)
class Piece:
    """A sentence, or a part of one, and the ids it has after a space."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True)
class NeedlePrompt:
    """The token ids of one prompt. ``length``: tokens of prompt and answer; ``depth``: 0 first, 1 last in the text."""

    length: int
    depth: float
    placed_depth: float  # where a sentence boundary allowed the fact to go, measured in tokens
    key: str
    value: str
    ids: tuple[int, ...]


def prompt_text(tokenizer: PreTrainedTokenizerBase, text: str, key: str) -> str:
    """Question and beginning of the answer, in the chat format where the tokenizer has one."""
    question, answer = PROMPT.format(text=text, key=key), ANSWER.format(key=key)
    if not tokenizer.chat_template:
        return f"{question}\n{answer}"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return chat + answer


def encode_start(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Ids of a prompt or of its beginning; a chat template has written BOS already."""
    return tokenizer(text, add_special_tokens=not tokenizer.chat_template, verbose=False).input_ids


class Prose:
    """Sentences of a prose file with their token ids, and the words that keys are made of."""

    def __init__(self, file: str | Path, tokenizer: PreTrainedTokenizerBase):
        prose = read_some(Path(file), tokenizer, HAYSTACK_CHARS)
        sentences = sentences_of(prose)
        if not sentences:
            raise HyLoError(f"{file} has no sentences to hide a needle in: expected prose")
        self.adjectives, self.nouns = key_words(prose)
        self.tokenizer = tokenizer
        rows = tokenizer([f" {text}" for text in sentences], add_special_tokens=False, verbose=False).input_ids
        self.pieces = [Piece(text, tuple(ids)) for text, ids in zip(sentences, rows, strict=True)]
        # Byte-level BPE never merges across the space before a word; other tokenizers may, and get whole texts to do.
        self.joins = True
        self.joins = self.encode(self.pieces, "key") == self._encode_whole(self.pieces, "key")

    def piece(self, text: str) -> Piece:
        return Piece(text, tuple(self.tokenizer(f" {text}", add_special_tokens=False, verbose=False).input_ids))

    def encode(self, pieces: list[Piece], key: str) -> list[int]:
        """The ids of the whole prompt around ``pieces``: one or more, joined by spaces."""
        if not self.joins or len(pieces) < 2:
            return self._encode_whole(pieces, key)
        before, _, after = prompt_text(self.tokenizer, PLACEHOLDER, key).partition(PLACEHOLDER)
        start = encode_start(self.tokenizer, before + pieces[0].text)
        between = chain.from_iterable(piece.ids for piece in pieces[1:-1])
        return [*start, *between, *self.piece(pieces[-1].text + after).ids]

    def _encode_whole(self, pieces: list[Piece], key: str) -> list[int]:
        text = " ".join(piece.text for piece in pieces)
        return encode_start(self.tokenizer, prompt_text(self.tokenizer, text, key))

    def take(self, start: int, budget: int) -> list[Piece]:
        """Sentences from ``start`` on (round and round if need be), then single words up to ``budget`` tokens."""
        taken, index = [], start % len(self.pieces)
        while budget >= len(self.pieces[index].ids):
            taken.append(self.pieces[index])
            budget -= len(self.pieces[index].ids)
            index = (index + 1) % len(self.pieces)
        words = []
        for word in islice(self._words(index), FILL_WORDS if budget else 0):
            if len(word.ids) <= budget:  # a longer one is passed over: the last word has to end on the last token
                words.append(word)
                budget -= len(word.ids)
            if not budget:
                break
        ids = tuple(chain.from_iterable(word.ids for word in words))
        return [*taken, Piece(" ".join(word.text for word in words), ids)] if words else taken

    def _words(self, index: int) -> Iterator[Piece]:
        while True:
            yield from map(self.piece, self.pieces[index].text.split())
            index = (index + 1) % len(self.pieces)


def depths_of(count: int) -> list[float]:
    """``count`` depths from the first to the last place; one alone is the middle."""
    return [0.5] if count == 1 else [index / (count - 1) for index in range(count)]


def place(filler: list[Piece], fact: Piece, depth: float) -> tuple[list[Piece], float]:
    """The fact at the sentence boundary nearest to ``depth`` in tokens, and that boundary's depth."""
    starts = [0, *accumulate(len(piece.ids) for piece in filler)]
    total = max(1, starts[-1])
    at = min(range(len(starts)), key=lambda index: abs(starts[index] - depth * total))
    return [*filler[:at], fact, *filler[at:]], starts[at] / total


def make_needle(haystack: Prose, length: int, depth: float, rng: random.Random) -> NeedlePrompt:
    """A prompt of ``length`` less the answer's tokens; shorter by a few where no filler comes out even."""
    key = f"{rng.choice(haystack.adjectives)}-{rng.choice(haystack.nouns)}"
    value = str(rng.randint(1_000_000, 9_999_999))
    fact, start = haystack.piece(FACT.format(key=key, value=value)), rng.randrange(len(haystack.pieces))
    room, best = length - MAX_NEW_TOKENS, None
    needed = len(haystack.encode([fact], key))
    budget = room - needed
    for _ in range(ATTEMPTS):
        if budget < 0:
            break
        pieces, placed = place(haystack.take(start, budget), fact, depth)
        ids = haystack.encode(pieces, key)
        if len(ids) <= room and (best is None or len(ids) > len(best.ids)):
            best = NeedlePrompt(length, depth, placed, key, value, tuple(ids))
        if len(ids) == room:
            break
        budget += room - len(ids)
    if best is None:
        least = needed + MAX_NEW_TOKENS + 32
        raise HyLoError(f"needle length {length} is too short for the question itself: use {least} or more")
    return best


def make_needles(haystack: Prose, lengths: Iterable[int], depths: int, samples: int, seed: int) -> list[NeedlePrompt]:
    """``samples`` prompts for every length and depth; each has its own seed, so no cell depends on the others."""
    return [
        make_needle(haystack, length, depth, random.Random(f"{seed}/{length}/{depth:.4f}/{sample}"))
        for length in lengths
        for depth in depths_of(depths)
        for sample in range(samples)
    ]
