"""RULER's two tasks of counting: the words that are most common in a list, and in coded text."""

import math
import random
from collections.abc import Iterator
from dataclasses import dataclass
from string import ascii_lowercase

from hylo_megatron.evaluate.encoding import BLOCK, SPACES, Border, Encoder, stretched
from hylo_megatron.evaluate.ruler.base import Draft, RulerTask

ASKED = 10
LEAST_ITEM = 3  # tokens of an item of a list: a number, a point and a word
MORE_WORDS = 300  # words beyond those that fill the list: the example's, and longer ones to choose from
LONG = 4096  # from this length on the words of a list are repeated more often
CWE_HEAD = "In this numbered list some words occur more often than the others. Keep the most frequent words in mind.\n"
CWE_TAIL = "\nQuestion: Which 10 words occur most often in the list above?"
CWE_PREFIX = "Answer: The 10 words that occur most often in the list above are:"
FWE_HEAD = (
    "This coded text has made-up words, and dots that mean nothing. Count how often each of the words occurs in the"
    " text.\n"
)
FWE_TAIL = "\nQuestion: Which three words occur most often in the coded text? Leave out the dots, explain nothing."
FWE_PREFIX = "Answer: The three coded words that occur most often in the text above are:"
DOTS = "..."
CODED_LETTERS = 6
TOKENS_A_WORD = 50  # of the prompt, for each word of the vocabulary
ZETA_2 = math.pi**2 / 6
LEAST_WORDS = 74  # from here on the third coded word occurs more often than the fourth


@dataclass(frozen=True, kw_only=True)
class CommonWords(RulerTask):
    """A numbered list in which ten words occur 30 times and all others 3 times, after a short solved example.

    In prompts of less than 4K tokens the words occur 6 times and once.
    """

    name: str = "cwe"
    max_new_tokens: int = 120
    border: Border = SPACES

    def draft(self, rng: random.Random, encoder: Encoder, length: int, budget: int) -> Draft:
        often, seldom = (30, 3) if length >= LONG else (6, 1)
        words = self.sources.words(rng, length // (LEAST_ITEM * seldom) + MORE_WORDS)
        shown, words = _list_example(rng, words, length)
        common = words[:ASKED]
        others = _others(encoder, [f" {word}" for word in words[ASKED:]], ASKED * often, seldom, budget)
        listed = often * common + seldom * [word.removeprefix(" ") for word in others]
        rng.shuffle(listed)
        return Draft(
            head=f"{shown}\n{CWE_HEAD}",
            texts=_numbered(listed),
            tail=CWE_TAIL,
            prefix=CWE_PREFIX,
            references=tuple(common),
        )


def _numbered(words: list[str]) -> list[str]:
    """Return number and word in turn."""
    return [text for at, word in enumerate(words) for text in (f" {at + 1}."[at == 0 :], f" {word}")]


def _list_example(rng: random.Random, words: list[str], length: int) -> tuple[str, list[str]]:
    """Return a solved example, and the words that are left."""
    count, often, seldom = (40, 10, 3) if length >= LONG else (20, 3, 1)
    listed = often * words[:ASKED] + seldom * words[ASKED:count]
    rng.shuffle(listed)
    answer = "".join(_numbered(words[:ASKED]))
    return f"{CWE_HEAD}{''.join(_numbered(listed))}{CWE_TAIL} {CWE_PREFIX} {answer}", words[count:]


def _others(encoder: Encoder, words: list[str], before: int, times: int, budget: int) -> list[str]:
    """Return words that fill ``budget`` tokens if each of them occurs ``times`` times in the list.

    ``before``: number of items that the list has already.
    """
    chosen, left = 0, budget
    for size in _sizes(encoder, words, before, times):
        if size > left:
            break
        chosen, left = chosen + 1, left - size
    return stretched(encoder, words[:chosen], words[chosen : chosen + BLOCK], left // times)


def _sizes(encoder: Encoder, words: list[str], before: int, times: int) -> Iterator[int]:
    """Yield the tokens of each word with its numbers."""
    for start in range(0, len(words), BLOCK):
        block = words[start : start + BLOCK]
        first, most = before + times * start + 1, times * len(block)
        numbers = [len(ids) for ids in encoder.pieces([f" {number}." for number in range(first, first + most)])]
        for at, ids in enumerate(encoder.pieces(block)):
            yield times * len(ids) + sum(numbers[times * at : times * (at + 1)])


@dataclass(frozen=True, kw_only=True)
class FrequentWords(RulerTask):
    """Coded words whose frequency falls with the square of their rank. The first rank is dots, which do not count."""

    name: str = "fwe"
    max_new_tokens: int = 50
    border: Border = SPACES

    def draft(self, rng: random.Random, encoder: Encoder, length: int, budget: int) -> Draft:
        coded: dict[str, None] = {DOTS: None}
        while len(coded) < max(5, (length - self.max_new_tokens) // TOKENS_A_WORD):
            coded["".join(rng.choices(ascii_lowercase, k=CODED_LETTERS))] = None
        words = list(coded)
        sizes = [len(ids) for ids in encoder.pieces([f" {word}" for word in words])]
        least = tokens_of(sizes, LEAST_WORDS)
        total = _most_words(sizes, least + budget)
        dots = (least + budget - tokens_of(sizes, total)) // sizes[0]
        texts = [word for word, count in zip(words, counts(len(words), total), strict=True) for _ in range(count)]
        texts += max(0, dots) * [DOTS]
        rng.shuffle(texts)
        return Draft(
            head=FWE_HEAD,
            texts=[texts[0], *(f" {word}" for word in texts[1:])],
            tail=FWE_TAIL,
            prefix=FWE_PREFIX,
            references=tuple(words[1:4]),
        )


def counts(vocabulary: int, total: int) -> list[int]:
    """Return how often each word occurs in a text of about ``total`` words, by rank (zeta distribution, alpha 2)."""
    return [int(total / rank**2 / ZETA_2) for rank in range(1, vocabulary + 1)]


def tokens_of(sizes: list[int], total: int) -> int:
    return sum(size * count for size, count in zip(sizes, counts(len(sizes), total), strict=True))


def _most_words(sizes: list[int], budget: int) -> int:
    """Return the largest total, at least ``LEAST_WORDS``, whose words have at most ``budget`` tokens."""
    low, high = LEAST_WORDS, max(LEAST_WORDS, 3 * budget) + 1
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if tokens_of(sizes, middle) <= budget else (low, middle)
    return low
