"""Synthetic retrieval samples: chats that quote or continue text, and questions about facts hidden in long text."""

import random
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from hylo_megatron.errors import HyLoError
from hylo_megatron.retrieval import templates
from hylo_megatron.retrieval.chat_format import PLAIN, ChatFormat
from hylo_megatron.retrieval.haystack import Haystack
from hylo_megatron.retrieval.templates import Needle

SHORTEST = 512  # tokens of a sample; a question, two facts and some text always fit
CUE = 8  # tokens that identify the passage to quote
QUOTED = 20, 80  # fewest and most tokens of a quote after its cue
CONTINUED = 0.4  # share of the chats' turns that continue text; the others quote
CHAT_NEEDLES, ASKED_FIRST = 0.7, 0.1  # shares of the samples with hidden facts
OWN_LINE = 0.2  # share of the hidden sentences that are on a line of their own


class Sample(NamedTuple):
    """``ids [length]``, and ``answers [length]`` (uint8): 1 where a token can only be known by reading the text."""

    kind: str  # "chat" | "needles"
    ids: np.ndarray
    answers: np.ndarray


@lru_cache(maxsize=4096)
def _encode(tokenizer, text: str) -> np.ndarray:
    """Return the ids of a text that is used many times, such as an instruction. The array must not be changed."""
    return np.array(tokenizer.encode(text, add_special_tokens=False).ids, dtype=np.int64)


class Row:
    """Consecutive tokens of a sample, with those of answers marked."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.length = 0
        self.ids: list[np.ndarray] = []
        self.answers: list[np.ndarray] = []

    def add(self, ids, answers=0) -> None:
        self.ids.append(np.asarray(ids, dtype=np.int64))
        self.answers.append(np.broadcast_to(np.asarray(answers, dtype=np.uint8), self.ids[-1].shape))
        self.length += len(self.ids[-1])

    def write(self, text: str) -> None:
        self.add(_encode(self.tokenizer, text))

    def write_answers(self, parts: list[str]) -> None:
        """Encode the ``parts`` as one text. Every second part is an answer.

        The token after an answer is marked too: otherwise a student finds the number but does not learn where to stop.
        """
        encoded = self.tokenizer.encode("".join(parts), add_special_tokens=False)
        inside = np.repeat([index % 2 for index in range(len(parts))], [len(part) for part in parts])
        answered = np.concatenate([[0], np.cumsum(inside)])  # number of answer characters before each position
        begin, end = np.array(encoded.offsets, dtype=np.int64).reshape(-1, 2).T
        marked = answered[end] > answered[begin]
        marked[1:] |= marked[:-1].copy()
        self.add(encoded.ids, marked)

    def join(self, other: "Row") -> None:
        self.ids += other.ids
        self.answers += other.answers
        self.length += other.length

    def sample(self, kind: str, length: int) -> Sample:
        return Sample(kind, np.concatenate(self.ids)[:length], np.concatenate(self.answers)[:length])


@dataclass(frozen=True)
class Samples:
    """``make(i)`` returns sample ``i``, which depends only on ``seed`` and ``i``. ``chat`` None: plain text only."""

    tokenizer: object
    haystack: Haystack
    words: list[str]
    chat: ChatFormat | None
    length: int
    seed: int
    chat_share: float

    def make(self, index: int) -> Sample:
        rng = random.Random(f"{self.seed}/{index}")
        if self.chat is not None and rng.random() < self.chat_share:
            return self._conversations(rng)
        return self._hidden_facts(rng)

    def _conversations(self, rng: random.Random) -> Sample:
        row = Row(self.tokenizer)
        while row.length < self.length:
            opening = self.chat.begin(rng)
            for _ in range(rng.randint(1, 4)):
                # The passage leaves room for its question and answer; otherwise the sample would end before them.
                longest = min(self.length // 2, 4096, self.length - row.length - 160)
                size = round(96 * (max(longest, 96) / 96) ** rng.random())
                passage = self.haystack.passage(size, rng, attempts=8)
                cue = None if longest < 96 or rng.random() < CONTINUED else self._cue(passage, rng)
                if cue is None:
                    self._continue(row, opening, passage, rng)
                else:
                    self._quote(row, opening, passage, cue, rng)
                opening = self.chat.again
            row.write(self.chat.close)
            row.add([self.haystack.eod_id])
        return row.sample("chat", self.length)

    def _continue(self, row: Row, opening: str, passage: np.ndarray, rng: random.Random) -> None:
        given = len(passage) * 2 // 3
        row.write(opening + rng.choice(templates.CONTINUE))
        row.add(passage[:given])
        row.write(self.chat.ask)
        row.add(passage[given:])

    def _cue(self, passage: np.ndarray, rng: random.Random) -> int | None:
        """Return where a passage begins whose first tokens occur only once in the text; None if none was found."""
        places = np.flatnonzero(self.haystack.kinds.begins_word[passage[: -CUE - QUOTED[0]]])
        for place in rng.sample(places.tolist(), min(3, len(places))):
            begins = np.flatnonzero(passage[: 1 - CUE] == passage[place])
            same = [begin for begin in begins if (passage[begin : begin + CUE] == passage[place : place + CUE]).all()]
            if same == [place]:
                return place
        return None

    def _quote(self, row: Row, opening: str, passage: np.ndarray, cue: int, rng: random.Random) -> None:
        """Write the text, the cue, and as the answer the cue and what follows it up to the end of a sentence."""
        instruction, prefix = rng.choice(templates.QUOTE)
        begin = cue + CUE
        ends = self.haystack.sentence_ends(passage[begin : begin + QUOTED[1] + 1])
        after = next((int(end) for end in ends if end >= QUOTED[0]), rng.randint(*QUOTED))
        row.write(opening)
        row.add(passage)
        row.write("\n\n" + instruction)
        row.add(passage[cue:begin])
        row.write(self.chat.ask + prefix)
        row.add(passage[cue:begin])
        row.add(passage[begin : begin + after], 1)

    def _hidden_facts(self, rng: random.Random) -> Sample:
        chat = self.chat if self.chat is not None and rng.random() < CHAT_NEEDLES else PLAIN
        needles = self._needles(rng)
        asked = rng.sample(needles, rng.randint(len(needles) // 2, len(needles)))
        asked_first = rng.random() < ASKED_FIRST
        opening = chat.begin(rng)
        if asked_first:
            opening += rng.choice(templates.INTROS_ASKING).format(question=asked[0].question)
        else:
            opening += rng.choice(templates.INTROS)
        row = Row(self.tokenizer)
        row.write(opening)
        hidden = [self._encode_fact(needle.statement, rng) for needle in needles]
        for count in range(len(asked), 0, -1):
            questions = Row(self.tokenizer)
            questions.write_answers(_dialogue(chat, asked[:count], asked_first))
            room = self.length - row.length - questions.length - sum(map(len, hidden))
            if room >= self.length // 4:
                break
        else:
            raise HyLoError(f"--length {self.length}: too short for facts and questions with this tokenizer: use more")
        self._hide(row, self.haystack.passage(room, rng), hidden, rng)
        row.join(questions)
        return row.sample("needles", self.length)

    def _needles(self, rng: random.Random) -> list[Needle]:
        """Return 2 (short samples) to 24 (long samples) facts, in groups that differ only in key and value."""
        count = rng.randint(2, min(24, max(4, self.length // 256)))
        needles, keys = [], set()
        while len(needles) < count:
            group = min(rng.randint(2, 6), count - len(needles))
            needles += templates.fill_alike(group, self.words, keys, rng)
        rng.shuffle(needles)
        return needles

    def _encode_fact(self, statement: str, rng: random.Random) -> list[int]:
        """Return the ids of a statement in the text: on a line of its own, or as one sentence among others."""
        own_line = not statement.endswith(".") or rng.random() < OWN_LINE
        text = f"\n{statement}\n" if own_line else f" {statement}"
        return self.tokenizer.encode(text, add_special_tokens=False).ids

    def _hide(self, row: Row, text: np.ndarray, hidden: list[list[int]], rng: random.Random) -> None:
        """Write the text with each fact at the first possible position after a depth drawn uniformly."""
        places = self.haystack.hiding_places(text)
        depths = sorted(rng.randrange(len(text)) for _ in hidden)
        last = 0
        for index, fact in zip(np.searchsorted(places, depths), hidden, strict=True):
            place = places[min(index, len(places) - 1)]
            row.add(text[last:place])
            row.add(fact)
            last = place
        row.add(text[last:])


def _dialogue(chat: ChatFormat, asked: list[Needle], asked_first: bool) -> list[str]:
    """Return questions and answers after a text as parts for ``Row.write_answers``: every second part is a value."""
    parts, text = [], "" if asked_first else f"\n\n{chat.first}{asked[0].question}"
    for number, needle in enumerate(asked):
        if number:
            text += chat.again + needle.question
        parts += [text + chat.ask + needle.prefix, needle.value]
        text = needle.suffix
    return [*parts, text + chat.close]
