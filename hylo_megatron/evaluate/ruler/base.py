"""The common part of RULER's tasks: prompts of exact length, and the two ways of scoring by string match."""

import random
from dataclasses import dataclass

from transformers import PreTrainedTokenizerBase

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.encoding import LINES, Border, Encoder, Ids, around, fit
from hylo_megatron.evaluate.ruler.sources import Sources
from hylo_megatron.evaluate.task import Prompt, Task

CHECKED = 8192  # tokens of the prompt that is tokenised both ways


@dataclass(frozen=True, kw_only=True)
class Draft:
    """A prompt before it is tokenised. ``head`` and ``tail`` are the instruction, ``prefix`` begins the answer."""

    head: str
    texts: list[str]
    tail: str
    prefix: str
    references: tuple[str, ...]

    def encode(self, encoder: Encoder, whole: bool) -> Ids:
        before, after = around(encoder.tokenizer, self.head, self.tail, self.prefix)
        return (encoder.whole if whole else encoder.prompt)(before, self.texts, after)


@dataclass(frozen=True, kw_only=True)
class RulerTask(Task):
    """A task of RULER. ``border``: how the texts of its prompts meet."""

    sources: Sources
    border: Border = LINES

    def draft(self, rng: random.Random, encoder: Encoder, length: int, budget: int) -> Draft:
        """Return a prompt with about ``budget`` tokens beside what it needs. ``rng`` starts in one state."""
        raise NotImplementedError

    def prompts(self, tokenizer: PreTrainedTokenizerBase, length: int, samples: int, seed: int) -> list[Prompt]:
        """Return prompts from the ids of their texts, if that gives the ids of the first prompt as a whole.

        Otherwise the tokenizer merges across texts, and every prompt is tokenised as a whole.
        """
        encoder = self.sources.encoder(tokenizer, self.border)
        seeds = self._seeds(length, samples, seed)
        whole = bool(seeds) and not self._joins(encoder, length, seeds[0])
        return [self._prompt(encoder, length, seed, whole) for seed in seeds]

    def _joins(self, encoder: Encoder, length: int, seed: str) -> bool:
        draft = self.draft(random.Random(seed), encoder, length, min(length, CHECKED))
        return draft.encode(encoder, whole=False) == draft.encode(encoder, whole=True)

    def _seeds(self, length: int, samples: int, seed: int) -> list[str]:
        return [f"{seed}/{self.name}/{length}/{sample}" for sample in range(samples)]

    def check(self, tokenizer: PreTrainedTokenizerBase, length: int, samples: int = 1, seed: int = 0) -> None:
        """Refuse a length that is too short for the shortest prompt. Raises ``HyLoError``.

        Other prompts of the length are drafted only where the first one fills half of it.
        """
        encoder = self.sources.encoder(tokenizer, self.border)
        for each in self._seeds(length, samples, seed):
            ids = self.draft(random.Random(each), encoder, length, 0).encode(encoder, whole=True)
            self._check(ids, length)
            if 2 * len(ids) < length:
                break

    def _check(self, ids: Ids, length: int) -> None:
        least = len(ids) + self.max_new_tokens
        if least > length:
            raise HyLoError(
                f"--ruler-lengths {length}: too short for {self.name}, whose question and answer have {least} tokens;"
                f" use {least} or more"
            )

    def score(self, answer: str, prompt: Prompt) -> float:
        """Return the share of references that occur in the answer, in upper or lower case."""
        return sum(reference.lower() in answer.lower() for reference in prompt.references) / len(prompt.references)

    def _prompt(self, encoder: Encoder, length: int, seed: str, whole: bool) -> Prompt:
        room = length - self.max_new_tokens

        def make(budget: int) -> tuple[Draft, Ids]:
            draft = self.draft(random.Random(seed), encoder, length, budget)
            return draft, draft.encode(encoder, whole)

        draft, ids = fit(make, room)
        self._check(ids, length)
        return Prompt(ids=ids, length=length, references=draft.references)
