"""Needle retrieval: hide one fact in prose, ask for it at the end, decode freely, and score the number in the answer.

Prompts of one length have the same number of tokens, or a few tokens fewer where no filler fits.
"""

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate, count, islice
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.encoding import SPACES, Encoder, Ids, around, encode_start, fit, question_text, take
from hylo_megatron.evaluate.task import Prompt, Task
from hylo_megatron.evaluate.texts import key_words, read_some, sentences_of

FACT = "One of the special magic numbers for {key} is: {value}."
PROMPT = (
    "Some special magic numbers are hidden within the following text. Make sure to memorize it. "
    "I will quiz you about the numbers afterwards.\n{text}\n"
    "What is the special magic number for {key} mentioned in the provided text?"
)
HEAD, TAIL = PROMPT.split("{text}")
ANSWER = "The special magic number for {key} mentioned in the provided text is"
MAX_NEW_TOKENS = 12
ROOM_FOR_KEYS = 128  # tokens by which a long key may lengthen a prompt, in which it stands three times
HAYSTACK_CHARS = 2_000_000
FILL_WORDS = 200  # words that are tried to fill a prompt exactly
NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+|\d+")
NUMBER_IS_OVER = re.compile(r"\d(?:[^\d,]|,\D)")


def first_number(text: str) -> str:
    """Return the first run of digits without thousands separators; empty if there is none."""
    found = NUMBER.search(text)
    return found.group().replace(",", "") if found else ""


@dataclass(frozen=True, kw_only=True)
class NeedlePrompt(Prompt):
    """A prompt with one needle. ``cell`` has the depth, from 0 (first sentence) to 1 (last)."""

    placed_depth: float  # depth of the sentence boundary where the fact is, measured in tokens
    key: str
    value: str


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """Retrieve a number of seven digits from ``depths`` places of a prose file; ``samples`` are those of a depth.

    ``form``: the file's format; None: as its contents say.
    """

    name: str = "needle"
    max_new_tokens: int = MAX_NEW_TOKENS
    file: Path
    depths: int = 5
    form: str | None = None

    def prompts(self, tokenizer, length: int, samples: int, seed: int) -> list[NeedlePrompt]:
        """Return ``samples`` prompts for every depth, each with its own seed, so cells do not depend on each other."""
        prose = prose_of(self.file, tokenizer, self.form)
        return [
            make_needle(prose, length, depth, random.Random(f"{seed}/{length}/{depth:.4f}/{sample}"))
            for depth in depths_of(self.depths)
            for sample in range(samples)
        ]

    def check(self, tokenizer, length: int, samples: int, seed: int) -> None:
        """Refuse a length that is too short, and a file without sentences. Raises ``HyLoError``.

        The prompts themselves are made only where the length is so short that their keys decide.
        """
        if check_shortest(tokenizer, length):
            sentences_and_keys(self.file, tokenizer, self.form)
        else:
            self.prompts(tokenizer, length, samples, seed)

    def score(self, answer: str, prompt: Prompt) -> float:
        return float(first_number(answer) == prompt.references[0])

    def finished(self, text: str) -> bool:
        return bool(NUMBER_IS_OVER.search(text))


def depths_of(number: int) -> list[float]:
    """Return ``number`` depths from the first to the last place; one alone is the middle."""
    return [0.5] if number == 1 else [index / (number - 1) for index in range(number)]


def sentences_and_keys(
    file: Path, tokenizer: PreTrainedTokenizerBase, form: str | None
) -> tuple[list[str], tuple[list[str], list[str]]]:
    """Return the sentences of a file, and the adjectives and nouns of keys. Raises ``HyLoError`` if it has none."""
    prose = read_some(file, tokenizer, HAYSTACK_CHARS, form)
    sentences = sentences_of(prose)
    if not sentences:
        raise HyLoError(f"{file} has no sentences to hide a needle in: expected prose")
    return sentences, key_words(prose)


class Prose:
    """Sentences of a prose file, each after a space, and the words for keys."""

    def __init__(self, file: str | Path, tokenizer: PreTrainedTokenizerBase, form: str | None = None):
        sentences, (self.adjectives, self.nouns) = sentences_and_keys(Path(file), tokenizer, form)
        self.sentences = [f" {sentence}" for sentence in sentences]
        self.encoder = Encoder(tokenizer, SPACES)
        # Byte-level BPE never merges across the space before a word. Other tokenizers may, so they encode whole texts.
        self.joins = True
        joined, self.joins = self.encode(self.sentences, "key"), False
        self.joins = joined == self.encode(self.sentences, "key")

    def encode(self, texts: list[str], key: str) -> Ids:
        """Return the ids of the whole prompt around ``texts`` (one or more)."""
        before, after = around(self.encoder.tokenizer, HEAD, TAIL.format(key=key), ANSWER.format(key=key))
        encode = self.encoder.prompt if self.joins else self.encoder.whole
        return encode(before, [texts[0].removeprefix(" "), *texts[1:]], after)

    def sizes(self, texts: list[str]) -> list[int]:
        return [len(ids) for ids in self.encoder.pieces(texts)]

    def filler(self, start: int, budget: int) -> list[str]:
        """Return sentences from ``start`` on, beginning again if needed, then words, up to ``budget`` tokens."""
        taken = take(self.encoder, self._from(start), budget)
        budget -= sum(self.sizes(taken))
        following = (f" {word}" for sentence in self._from(start + len(taken)) for word in sentence.split())
        words = ""
        for word in islice(following, FILL_WORDS if budget else 0):
            size = self.encoder.count(word)
            if size <= budget:  # a longer word is skipped, because the last word has to end on the last token
                words += word
                budget -= size
            if not budget:
                break
        return [*taken, words] if words else taken

    def _from(self, start: int) -> Iterator[str]:
        return (self.sentences[index % len(self.sentences)] for index in count(start))

    def place(self, filler: list[str], fact: str, depth: float) -> tuple[list[str], float]:
        """Put the fact at the boundary of texts nearest to ``depth`` in tokens; return texts and that one's depth."""
        starts = list(accumulate(self.sizes(filler), initial=0))
        total = max(1, starts[-1])
        at = min(range(len(starts)), key=lambda index: abs(starts[index] - depth * total))
        return [*filler[:at], fact, *filler[at:]], starts[at] / total


@lru_cache(maxsize=1)
def prose_of(file: Path, tokenizer: PreTrainedTokenizerBase, form: str | None) -> Prose:
    """Return the prose of a file, kept for the next length or task of the same model."""
    return Prose(file, tokenizer, form)


def _check_length(ids: Ids, length: int) -> None:
    if len(ids) + MAX_NEW_TOKENS > length:
        least = len(ids) + MAX_NEW_TOKENS + 32
        raise HyLoError(f"--needle-lengths {length}: too short for the question itself; use {least} or more")


def check_shortest(tokenizer: PreTrainedTokenizerBase, length: int) -> bool:
    """Return whether a length has room for any key. Raises ``HyLoError`` for a length that no question fits."""
    key = "able-word"
    text = PROMPT.format(text=FACT.format(key=key, value="1234567"), key=key)
    ids = tuple(encode_start(tokenizer, question_text(tokenizer, text, ANSWER.format(key=key))))
    _check_length(ids, length)
    return len(ids) + MAX_NEW_TOKENS + ROOM_FOR_KEYS <= length


def make_needle(prose: Prose, length: int, depth: float, rng: random.Random) -> NeedlePrompt:
    """Return a prompt of ``length`` less the answer's tokens, or a few tokens shorter if no filler fits exactly."""
    key = f"{rng.choice(prose.adjectives)}-{rng.choice(prose.nouns)}"
    value = str(rng.randint(1_000_000, 9_999_999))
    fact, start = f" {FACT.format(key=key, value=value)}", rng.randrange(len(prose.sentences))

    def make(budget: int) -> tuple[float, Ids]:
        texts, placed = prose.place(prose.filler(start, budget), fact, depth)
        return placed, prose.encode(texts, key)

    placed, ids = fit(make, length - MAX_NEW_TOKENS)
    _check_length(ids, length)
    return NeedlePrompt(
        ids=ids, length=length, references=(value,), cell={"depth": depth}, placed_depth=placed, key=key, value=value
    )
