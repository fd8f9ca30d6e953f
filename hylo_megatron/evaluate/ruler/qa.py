"""RULER's two tasks of answering questions from documents, among other documents."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.encoding import Encoder, beginnings, longest
from hylo_megatron.evaluate.ruler.base import Draft, RulerTask
from hylo_megatron.evaluate.ruler.questions import Library, Question
from hylo_megatron.evaluate.task import Prompt

ASK = "Answer the question from these documents. Reply with the answer and nothing else.\n\n"
TAIL = f"{ASK}Question: {{question}}"
PREFIX = "Answer:"
TRIES = 200
SHORTEST_PART = 16  # tokens of a document that is cut, with its label
CUT = 16  # documents that are tried for a cut that fills the prompt exactly


@dataclass(frozen=True, kw_only=True)
class Documents(RulerTask):
    """A question, the documents that it needs, and other documents. ``hops``: 1 is SQuAD's place, 2 HotpotQA's."""

    max_new_tokens: int = 32
    hops: int = 1

    @property
    def library(self) -> Library:
        return self.sources.one_hop if self.hops == 1 else self.sources.two_hops

    def score(self, answer: str, prompt: Prompt) -> float:
        """Return 1 if one of the references occurs in the answer, in upper or lower case."""
        return float(any(reference.lower() in answer.lower() for reference in prompt.references))

    def draft(self, rng: random.Random, encoder: Encoder, length: int, budget: int) -> Draft:
        library = self.library
        asked = _question(rng, library, encoder, length - self.max_new_tokens)
        own = [library.documents[number] for number in asked.own]
        if len(own) == len(library.documents):
            raise HyLoError(f"RULER's {self.name}: its file has one question's documents only, expected others")
        others = _others(rng, library, asked)
        documents = own + _filling(encoder, others, len(own), budget)
        rng.shuffle(documents)
        pairs = ((_label(at + 1), f"{document}\n\n") for at, document in enumerate(documents))
        return Draft(
            head=ASK,
            texts=[text for pair in pairs for text in pair],
            tail=TAIL.format(question=asked.text),
            prefix=PREFIX,
            references=asked.answers,
        )


def _label(number: int) -> str:
    return f"Document {number}:\n"


def _size(encoder: Encoder, document: str, number: int) -> int:
    return encoder.count(_label(number)) + encoder.count(f"{document}\n\n")


def _filling(encoder: Encoder, others: Iterator[str], before: int, budget: int) -> list[str]:
    """Return documents of ``budget`` tokens with their labels. The last one is cut behind a word.

    ``before``: documents that have labels already.
    """
    taken, left = [], budget
    document = next(others, "")
    while document and (size := _size(encoder, document, before + len(taken) + 1)) <= left:
        taken.append(document)
        left -= size
        document = next(others, "")
    if taken and left < SHORTEST_PART:
        left += _size(encoder, taken[-1], before + len(taken))
        document = taken.pop()
    parts = (part for text in [document, *islice(others, CUT)] for part in beginnings(text, "\n\n"))
    left -= encoder.count(_label(before + len(taken) + 1))
    return taken + [part.rstrip() for part in longest(encoder, parts, left)]


def _question(rng: random.Random, library: Library, encoder: Encoder, room: int) -> Question:
    """Return a random question whose documents have room."""
    for _ in range(TRIES):
        asked = rng.choice(library.questions)
        needed = sum(_size(encoder, library.documents[number], 1) for number in asked.own)
        if needed + encoder.count(f"{ASK}{TAIL}{asked.text}") < room:
            return asked
    raise HyLoError(
        f"{room} tokens are too few for the documents of one of RULER's questions, the last ones had {needed}:"
        " use a greater length"
    )


def _others(rng: random.Random, library: Library, asked: Question) -> Iterator[str]:
    """Yield other documents: those of the same article in random order, then all in random order, again and again."""
    related = rng.sample(asked.related, len(asked.related))
    yield from (library.documents[number] for number in related)
    used = {*asked.own, *related}
    while rest := [number for number in range(len(library.documents)) if number not in used]:
        rng.shuffle(rest)
        yield from (library.documents[number] for number in rest)
        used = set(asked.own)
