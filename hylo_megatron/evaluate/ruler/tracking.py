"""RULER's variable tracking: a chain of assignments in repeated sentences, with a solved example before it."""

import random
from dataclasses import dataclass
from string import ascii_uppercase

from hylo_megatron.evaluate.encoding import Encoder
from hylo_megatron.evaluate.ruler.base import Draft, RulerTask
from hylo_megatron.evaluate.ruler.niah import NOISE, fill_with_noise

HOPS = 4
HEAD = "This text assigns values to variables, and variables to other variables. Follow the assignments.\n\n"
TAIL = "Question: Which variables have the value {value} in the text above?"
PREFIX = "Answer: In the text above, these {count} variables have the value {value}:"
EXAMPLE_TOKENS = 500
EXAMPLE_SHARE = 4  # the example takes at most a quarter of a short prompt


@dataclass(frozen=True, kw_only=True)
class Chain:
    """Variables of one value. ``lines``: the assignments in order."""

    names: list[str]
    value: str

    @property
    def lines(self) -> list[str]:
        pairs = zip(self.names, self.names[1:], strict=False)
        return [f"VAR {self.names[0]} = {self.value}\n", *(f"VAR {to} = VAR {of}\n" for of, to in pairs)]

    @property
    def labels(self) -> dict:
        return {"value": self.value, "count": len(self.names)}


@dataclass(frozen=True, kw_only=True)
class Tracking(RulerTask):
    """One chain of five variables. All five are the answer."""

    name: str = "vt"
    max_new_tokens: int = 30

    def draft(self, rng: random.Random, encoder: Encoder, length: int, budget: int) -> Draft:
        example, chain = _chain(rng, 3), _chain(rng, 5)
        shown = _example(rng, encoder, example, min(EXAMPLE_TOKENS, length // EXAMPLE_SHARE))
        return Draft(
            head=f"{shown}\n\n{HEAD}",
            texts=_scattered(rng, chain.lines, fill_with_noise(encoder, budget)),
            tail=TAIL.format(**chain.labels),
            prefix=PREFIX.format(**chain.labels),
            references=tuple(chain.names),
        )


def _chain(rng: random.Random, letters: int) -> Chain:
    names: dict[str, None] = {}
    while len(names) < HOPS + 1:
        names["".join(rng.choices(ascii_uppercase, k=letters))] = None
    return Chain(names=list(names), value=str(rng.randint(10_000, 99_999)))


def _scattered(rng: random.Random, lines: list[str], among: list[str]) -> list[str]:
    """Return ``among`` with ``lines`` at random places, in order."""
    texts = list(among)
    for done, place in enumerate(sorted(rng.choices(range(len(among) + 1), k=len(lines)))):
        texts.insert(place + done, lines[done])
    return texts


def _example(rng: random.Random, encoder: Encoder, chain: Chain, tokens: int) -> str:
    """Return a solved example of about ``tokens`` tokens."""
    tail = f"{TAIL} {PREFIX} {' '.join(chain.names)}".format(**chain.labels)
    needed = encoder.count(f"{HEAD}{''.join(chain.lines)}{tail}")
    noise = [NOISE] * max(0, (tokens - needed) // encoder.count(NOISE))
    return f"{HEAD}{''.join(_scattered(rng, chain.lines, noise))}{tail}"
