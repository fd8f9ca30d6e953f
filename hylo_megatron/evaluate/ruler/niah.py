"""RULER's eight needle tasks: facts in repeated sentences, in prose, or among other facts of the same form."""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice

from hylo_megatron.evaluate.encoding import BLOCK, LINES, SPACES, Encoder, beginnings, exact, stretched, take
from hylo_megatron.evaluate.ruler.base import Draft, RulerTask
from hylo_megatron.evaluate.ruler.sources import Sources, number, random_uuid

NOISE = "The road is dry. The hill is steep. The barn is red. On we walk. Up and down we go.\n"
DEPTHS = 40  # places of a needle in prose, evenly spread from the beginning to the end
HEAD_ONE = "The following text mentions a secret {kind}. Keep the {kind} in mind, since a question follows.\n"
HEAD = "The following text mentions several secret {kind}s. Keep the {kind}s in mind, since a question follows.\n"
FACT = "A secret {kind} belonging to {key} is {value}."
TAIL_ONE = "Which secret {kind} belongs to {key} in the text above?"
TAIL = "Which secret {kind}s belong to {key} in the text above? Name them all."
PREFIX_ONE = "In the text above, the secret {kind} belonging to {key} is"
PREFIX = "In the text above, the secret {kind}s belonging to {key} are"
KINDS = {"number": number, "UUID": random_uuid}


@dataclass(frozen=True, kw_only=True)
class Niah(RulerTask):
    """Needles with ``keys`` keys, of which ``queries`` are asked for, and ``values`` values a key.

    ``haystack``: noise, prose or needles. ``key_kind``: words or UUID. ``kind``: number or UUID.
    """

    max_new_tokens: int = 128
    haystack: str = "prose"
    key_kind: str = "words"
    kind: str = "number"
    keys: int = 1
    values: int = 1
    queries: int = 1

    def draft(self, rng: random.Random, encoder: Encoder, length: int, budget: int) -> Draft:
        facts: dict[str, list[str]] = {}
        while len(facts) < self.keys:
            facts.setdefault(self._key(rng), [KINDS[self.kind](rng) for _ in range(self.values)])
        asked = rng.sample(list(facts), self.queries)
        needles = [self._fact(key, value) for key, values in facts.items() for value in values]
        rng.shuffle(needles)
        texts = (self._in_prose if self.haystack == "prose" else self._in_lines)(rng, encoder, needles, facts, budget)
        one = self.queries * self.values == 1
        labels = {"kind": self.kind, "key": _listed(asked)}
        return Draft(
            head=(HEAD_ONE if one else HEAD).format(**labels),
            texts=texts,
            tail=("\n" if self.border == SPACES else "") + (TAIL_ONE if one else TAIL).format(**labels),
            prefix=(PREFIX_ONE if one else PREFIX).format(**labels),
            references=tuple(value for key in asked for value in facts[key]),
        )

    def _key(self, rng: random.Random) -> str:
        if self.key_kind == "UUID":
            return random_uuid(rng)
        adjectives, nouns = self.sources.keys
        return f"{rng.choice(adjectives)}-{rng.choice(nouns)}"

    def _fact(self, key: str, value: str) -> str:
        return FACT.format(kind=self.kind, key=key, value=value)

    def _in_prose(self, rng, encoder: Encoder, needles: list[str], facts: dict, budget: int) -> list[str]:
        """Return sentences from a random place on, with each needle at one of the depths."""
        sentences, start = self.sources.sentences, rng.randrange(len(self.sources.sentences))
        rest = (f" {sentences[index % len(sentences)]}" for index in range(start, start + 10**9))
        places = sorted(rng.sample(range(DEPTHS), len(needles)))
        taken = take(encoder, rest, budget)
        left = budget - sum(map(len, encoder.pieces(taken)))
        following = (sentences[(start + len(taken) + more) % len(sentences)] for more in range(4))
        taken += exact(encoder, (part for text in following for part in _spaced(text)), left)
        for done, (place, needle) in enumerate(zip(places, needles, strict=True)):
            taken.insert(done + round((len(taken) - done) * place / (DEPTHS - 1)), f" {needle}")
        return [taken[0].removeprefix(" "), *taken[1:]]

    def _in_lines(self, rng, encoder: Encoder, needles: list[str], facts: dict, budget: int) -> list[str]:
        """Return lines of noise, or of other needles, with each needle at a random place."""
        if self.haystack == "noise":
            taken = fill_with_noise(encoder, budget)
        else:
            taken = fill_with_lines(encoder, self._others(rng, facts), budget)
        for needle in needles:
            taken.insert(rng.randrange(len(taken) + 1), f"{needle}\n")
        return taken

    def _others(self, rng: random.Random, facts: dict[str, list[str]]) -> Iterator[str]:
        answers = {value for values in facts.values() for value in values}
        while True:
            key, value = self._key(rng), KINDS[self.kind](rng)
            if key not in facts and value not in answers:
                yield f"{self._fact(key, value)}\n"


def fill_with_lines(encoder: Encoder, lines: Iterator[str], budget: int) -> list[str]:
    """Return complete lines of ``budget`` tokens if possible, otherwise of a few less."""
    taken = take(encoder, lines, budget)
    left = budget - sum(map(len, encoder.pieces(taken)))
    return stretched(encoder, taken, list(islice(lines, BLOCK)), left)


def fill_with_noise(encoder: Encoder, budget: int) -> list[str]:
    """Return lines of noise of ``budget`` tokens. The last one or two are parts of a line."""
    lines = [NOISE] * max(0, budget // encoder.count(NOISE) - 1)
    return lines + exact(encoder, beginnings(NOISE, "\n"), budget - len(lines) * encoder.count(NOISE))


def _spaced(text: str) -> list[str]:
    return [f" {part}" for part in beginnings(text)]


def _listed(names: list[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def niah_tasks(sources: Sources) -> list[Niah]:
    """Return the eight tasks in RULER's order."""
    lines, prose = {"sources": sources, "border": LINES}, {"sources": sources, "border": SPACES}
    return [
        Niah(name="niah_single_1", haystack="noise", **lines),
        Niah(name="niah_single_2", **prose),
        Niah(name="niah_single_3", kind="UUID", **prose),
        Niah(name="niah_multikey_1", keys=4, **prose),
        Niah(name="niah_multikey_2", haystack="needles", **lines),
        Niah(name="niah_multikey_3", haystack="needles", key_kind="UUID", kind="UUID", **lines),
        Niah(name="niah_multivalue", values=4, **prose),
        Niah(name="niah_multiquery", keys=4, queries=4, **prose),
    ]
