"""Token ids of prompts. Those of long prompts are joined from the ids of their texts, so little is tokenised."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import accumulate, chain, islice
from typing import TypeVar

from transformers import PreTrainedTokenizerBase

from hylo_megatron.data.chat_template import ChatTemplate
from hylo_megatron.errors import HyLoError, first_line

BLOCK = 256  # texts that are tokenised together
MOST_CACHED = 200_000
PLACEHOLDER = "THE-TEXT-GOES-HERE"
ATTEMPTS = 4
MORE_ATTEMPTS = 16  # as long as more than CLOSE tokens are missing: a tokenizer that merges across texts
CLOSE = 8
Ids = tuple[int, ...]
T = TypeVar("T")


def encode_open(tokenizer: PreTrainedTokenizerBase, text: str, special: bool) -> list[int]:
    """Return the ids of a text without the end token that some tokenizers add behind every text.

    ``special``: keep the token that the tokenizer puts first, if it adds one.
    """
    ids = tokenizer(text, add_special_tokens=special, verbose=False).input_ids
    ended = special and ids and ids[-1] == tokenizer.eos_token_id and not text.endswith(tokenizer.eos_token)
    return ids[:-1] if ended else ids


def encode_start(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Return the ids of a prompt or of its beginning. A chat template has already written BOS."""
    return encode_open(tokenizer, text, special=not tokenizer.chat_template)


def question_text(tokenizer: PreTrainedTokenizerBase, question: str, answer: str) -> str:
    """Return a question and the beginning of its answer, in the chat format if the tokenizer has one.

    Raises ``HyLoError`` if its chat template cannot be used.
    """
    if not tokenizer.chat_template:
        return f"{question}\n{answer}"
    where = tokenizer.name_or_path
    ChatTemplate(tokenizer).choose(None, where)
    try:
        chat = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], tokenize=False, add_generation_prompt=True, enable_thinking=False
        )
    except Exception as error:  # templates are programs and may raise anything
        raise HyLoError(
            f"{where}: the chat template does not render a question ({first_line(error)}); correct it, or remove it"
            " to ask in plain text"
        ) from error
    return chat + answer


@dataclass(frozen=True)
class Border:
    """How the texts of a prompt meet. ``left`` and ``right``: what a text is tokenised between."""

    left: str
    right: str


SPACES = Border("x", "")  # each text but the first begins with a space
LINES = Border("\n", "A")  # each text but the last ends with a line feed


def around(tokenizer: PreTrainedTokenizerBase, head: str, tail: str, prefix: str) -> tuple[str, str]:
    """Return the parts of a prompt before and after its text.

    ``head`` and ``tail`` are the instruction around the text. ``prefix`` begins the answer. The chat format is used if
    the tokenizer has one.
    """
    whole = question_text(tokenizer, f"{head}{PLACEHOLDER}{tail}", prefix)
    before, _, after = whole.partition(PLACEHOLDER)
    return before, after


class Encoder:
    """Tokenises the texts of prompts one by one and remembers their ids."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, border: Border):
        self.tokenizer, self.border = tokenizer, border
        self.left = self._plain([border.left])[0]
        self.right = self._plain([border.left + border.right])[0][len(self.left) :]
        self._known: dict[str, tuple[int, ...]] = {}

    def pieces(self, texts: list[str]) -> list[tuple[int, ...]]:
        """Return the ids of each text between two other texts."""
        if len(self._known) > MOST_CACHED:
            self._known.clear()
        known = {text: self._known[text] for text in texts if text in self._known}
        fresh = [text for text in dict.fromkeys(texts) if text not in known]
        for start in range(0, len(fresh), 16 * BLOCK):
            some = fresh[start : start + 16 * BLOCK]
            rows = self._plain([f"{self.border.left}{text}{self.border.right}" for text in some])
            known |= {text: self._inner(row) for text, row in zip(some, rows, strict=True)}
        self._known |= {text: known[text] for text in fresh}
        return [known[text] for text in texts]

    def count(self, text: str) -> int:
        return len(self.pieces([text])[0])

    def prompt(self, before: str, texts: list[str], after: str) -> tuple[int, ...]:
        """Return the ids of ``before``, ``texts`` and ``after``, each text tokenised alone.

        They are the ids of the whole prompt unless the tokenizer merges across the border of two texts.
        """
        if len(texts) < 2:
            return self.whole(before, texts, after)
        begun = encode_start(self.tokenizer, f"{before}{texts[0]}{self.border.right}")
        ended = self._plain([f"{self.border.left}{texts[-1]}{after}"])[0]
        first, last = begun[: len(begun) - len(self.right)], ended[len(self.left) :]
        return tuple(chain(first, chain.from_iterable(self.pieces(texts[1:-1])), last))

    def whole(self, before: str, texts: list[str], after: str) -> tuple[int, ...]:
        return tuple(encode_start(self.tokenizer, "".join((before, *texts, after))))

    def _plain(self, texts: list[str]) -> list[list[int]]:
        return self.tokenizer(
            texts, add_special_tokens=False, verbose=False, return_attention_mask=False, return_token_type_ids=False
        ).input_ids

    def _inner(self, row: list[int]) -> tuple[int, ...]:
        return tuple(row[len(self.left) : len(row) - len(self.right)])


def take(encoder: Encoder, texts: Iterator[str], budget: int) -> list[str]:
    """Return texts from the front of an endless iterator until the next one exceeds ``budget`` tokens."""
    taken = []
    while True:
        block = list(islice(texts, BLOCK))
        for text, ids in zip(block, encoder.pieces(block), strict=True):
            if len(ids) > budget:
                return taken
            taken.append(text)
            budget -= len(ids)


def exact(encoder: Encoder, candidates: Iterable[str], budget: int) -> list[str]:
    """Return at most two of the candidates that come closest to ``budget`` tokens from below."""
    candidates = list(candidates)
    sizes = {len(ids): text for text, ids in zip(candidates, encoder.pieces(candidates), strict=True)}
    sizes[0] = ""
    best = max(
        ((first, second) for first in sizes for second in sizes if first + second <= budget),
        key=lambda pair: (sum(pair), max(pair)),
        default=(0, 0),
    )
    return [sizes[size] for size in best if size]


def longest(encoder: Encoder, candidates: Iterable[str], budget: int) -> list[str]:
    """Return the candidate that comes closest to ``budget`` tokens from below, if there is one."""
    candidates = list(candidates)
    sized = ((len(ids), text) for text, ids in zip(candidates, encoder.pieces(candidates), strict=True))
    return [text for _, text in sorted(pair for pair in sized if pair[0] <= budget)[-1:]]


def stretched(encoder: Encoder, texts: list[str], spare: list[str], tokens: int) -> list[str]:
    """Return ``texts`` with some exchanged for spare ones that are ``tokens`` longer together, or a little less."""
    longer: dict[int, list[str]] = {}
    for text, ids in zip(spare, encoder.pieces(spare), strict=True):
        longer.setdefault(len(ids), []).append(text)
    result = list(texts)
    for at, ids in enumerate(encoder.pieces(texts) if tokens > 0 else ()):
        size = next((size for size in range(len(ids) + tokens, len(ids), -1) if longer.get(size)), len(ids))
        if size > len(ids):
            result[at] = longer[size].pop()
            tokens -= size - len(ids)
    return result


def beginnings(text: str, end: str = "") -> list[str]:
    """Return the first word of a text, the first two words, and so on, each with ``end`` behind it."""
    words = text.rstrip("\n").split(" ")
    return [part + end for part in accumulate(words, lambda one, other: f"{one} {other}") if part.strip()]


def fit(make: Callable[[int], tuple[T, Ids]], room: int) -> tuple[T, Ids]:
    """Return the longest prompt found with its ids: at most ``room``, unless the shortest prompt has more.

    ``make(budget)`` returns a prompt with about ``budget`` tokens beside what it needs, and its ids.
    """
    best = make(0)
    budget = room - len(best[1])
    for attempt in range(MORE_ATTEMPTS):
        missing = room - len(best[1])
        if budget < 1 or missing == 0 or (attempt >= ATTEMPTS and missing <= CLOSE):
            break
        prompt, ids = make(budget)
        if len(best[1]) < len(ids) <= room:
            best = prompt, ids
        if len(ids) == room:
            break
        budget += room - len(ids)
    return best
