"""Prompts of the needle test: one fact hidden in prose and a question after it.

All prompts of a length are equally long. A prompt is assembled from the token ids of its sentences, so a prompt of
256K tokens needs no tokenising.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, chain, islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.task import Prompt
from hylo_megatron.evaluate.texts import encode_open, key_words, read_some, sentences_of

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
FILL_WORDS = 200  # words that are tried to fill a prompt exactly
ATTEMPTS = 6


@dataclass(frozen=True)
class Piece:
    """A sentence, or a part of one, with its ids after a space."""

    text: str
    ids: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class NeedlePrompt(Prompt):
    """A prompt with one needle. ``cell`` has the depth, from 0 (first sentence) to 1 (last)."""

    placed_depth: float  # depth of the sentence boundary where the fact is, measured in tokens
    key: str
    value: str


def question_text(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> str:
    """Return a question and the beginning of its answer, in the chat format if the tokenizer has one."""
    if not tokenizer.chat_template:
        return f"{question}\n{answer}"
    chat = tokenizer.apply_chat_template(
        [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=False
    )
    return chat + answer


def prompt_text(tokenizer: PreTrainedTokenizerBase, text: str, key: str) -> str:
    """Return the question for the needle in ``text`` and the beginning of its answer."""
    return question_text(tokenizer, PROMPT.format(text=text, key=key), ANSWER.format(key=key))


def encode_start(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a prompt or of its beginning. A chat template has already written BOS."""
    return encode_open(tokenizer, text, special=not tokenizer.chat_template)


@lru_cache(maxsize=1)
def prose_of(file: Path, tokenizer: PreTrainedTokenizerBase) -> "Prose":
    """Return the prose of a file, kept for the next length or task of the same model."""
    return Prose(file, tokenizer)


class Prose:
    """Sentences of a prose file with their token ids, and the words for keys."""

    def __init__(self, file: str | Path, tokenizer: PreTrainedTokenizerBase):
        prose = read_some(Path(file), tokenizer, HAYSTACK_CHARS)
        sentences = sentences_of(prose)
        if not sentences:
            raise HyLoError(f"{file} has no sentences to hide a needle in: expected prose")
        self.adjectives, self.nouns = key_words(prose)
        self.tokenizer = tokenizer
        rows = tokenizer([f" {text}" for text in sentences], add_special_tokens=False, verbose=False).input_ids
        self.pieces = [Piece(text, tuple(ids)) for text, ids in zip(sentences, rows, strict=True)]
        # Byte-level BPE never merges across the space before a word. Other tokenizers may, so they encode whole texts.
        self.joins = True
        self.joins = self.encode(self.pieces, "key") == self._encode_whole(self.pieces, "key")

    def piece(self, text: str) -> Piece:
        return Piece(text, tuple(self.tokenizer(f" {text}", add_special_tokens=False, verbose=False).input_ids))

    def encode(self, pieces: list[Piece], key: str) -> list[int]:
        """Return the ids of the whole prompt around ``pieces`` (one or more), joined by spaces."""
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
        """Return sentences from ``start`` on, repeating the text if needed, then single words up to ``budget``
        tokens.
        """
        taken, index = [], start % len(self.pieces)
        while budget >= len(self.pieces[index].ids):
            taken.append(self.pieces[index])
            budget -= len(self.pieces[index].ids)
            index = (index + 1) % len(self.pieces)
        words = []
        for word in islice(self._words(index), FILL_WORDS if budget else 0):
            if len(word.ids) <= budget:  # a longer word is skipped, because the last word has to end on the last token
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
    """Return ``count`` depths from the first to the last place; one alone is the middle."""
    return [0.5] if count == 1 else [index / (count - 1) for index in range(count)]


def place(filler: list[Piece], fact: Piece, depth: float) -> tuple[list[Piece], float]:
    """Put the fact at the sentence boundary nearest to ``depth`` in tokens.

    Returns the pieces and that boundary's depth.
    """
    starts = [0, *accumulate(len(piece.ids) for piece in filler)]
    total = max(1, starts[-1])
    at = min(range(len(starts)), key=lambda index: abs(starts[index] - depth * total))
    return [*filler[:at], fact, *filler[at:]], starts[at] / total


def make_needle(haystack: Prose, length: int, depth: float, rng: random.Random) -> NeedlePrompt:
    """Return a prompt of ``length`` less the answer's tokens, or a few tokens shorter if no filler fits exactly."""
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
            best = NeedlePrompt(
                ids=tuple(ids),
                length=length,
                references=(value,),
                cell={"depth": depth},
                placed_depth=placed,
                key=key,
                value=value,
            )
        if len(ids) == room:
            break
        budget += room - len(ids)
    if best is None:
        least = needed + MAX_NEW_TOKENS + 32
        raise HyLoError(f"needle length {length} is too short for the question itself: use {least} or more")
    return best


def make_needles(haystack: Prose, length: int, depths: int, samples: int, seed: int) -> list[NeedlePrompt]:
    """Return ``samples`` prompts for every depth, each with its own seed, so cells do not depend on each other."""
    return [
        make_needle(haystack, length, depth, random.Random(f"{seed}/{length}/{depth:.4f}/{sample}"))
        for depth in depths_of(depths)
        for sample in range(samples)
    ]
