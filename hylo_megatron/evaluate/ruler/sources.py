"""What RULER prompts are made of: sentences and words of a prose file, and made words, numbers and UUIDs."""

import random
import uuid
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hylo_megatron.data.documents import detect_format
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.encoding import Border, Encoder
from hylo_megatron.evaluate.ruler.questions import Library, read_library
from hylo_megatron.evaluate.ruler.world import first_words, made_library
from hylo_megatron.evaluate.texts import WORD, key_words, read_some, sentences_of

PROSE_CHARS = 4_000_000


@dataclass(frozen=True, kw_only=True)
class Sources:
    """Files that the tasks read, each once.

    ``prose``: the haystack and the words, ``form`` its format; None: as its contents say. ``squad`` and
    ``hotpot``: questions of qa_1 and qa_2; without a file the questions are made.
    """

    prose: Path
    squad: Path | None = None
    hotpot: Path | None = None
    form: str | None = None
    _encoders: dict[Border, Encoder] = field(default_factory=dict, repr=False, compare=False)

    def encoder(self, tokenizer: PreTrainedTokenizerBase, border: Border) -> Encoder:
        """Return the encoder of the tokenizer that was used last, with the ids that it knows already."""
        found = self._encoders.get(border)
        if found is None or found.tokenizer is not tokenizer:
            found = self._encoders[border] = Encoder(tokenizer, border)
        return found

    @cached_property
    def text(self) -> str:
        if detect_format(Path(self.prose), self.form) == "chat":
            raise HyLoError(f"{self.prose}: has conversations, expected prose: give a text file for RULER's haystack")
        return read_some(Path(self.prose), None, PROSE_CHARS, self.form)

    @cached_property
    def sentences(self) -> list[str]:
        if found := sentences_of(self.text):
            return found
        raise HyLoError(f"{self.prose} has no sentences to hide a needle in: expected prose")

    @cached_property
    def keys(self) -> tuple[list[str], list[str]]:
        """Adjectives and nouns."""
        return key_words(self.text)

    @cached_property
    def _words(self) -> list[str]:
        return sorted(set(WORD.findall(self.text)))

    def words(self, rng: random.Random, count: int) -> list[str]:
        """Return ``count`` different words in random order: words of the prose, then made ones if it has too few."""
        known = set(self._words)
        missing = count - len(known)
        made = [word for word in first_words(count) if word not in known] if missing > 0 else []
        return rng.sample(self._words, min(count, len(known))) + made[: max(0, missing)]

    @cached_property
    def one_hop(self) -> Library:
        return read_library(self.squad) if self.squad else made_library(hops=1)

    @cached_property
    def two_hops(self) -> Library:
        return read_library(self.hotpot) if self.hotpot else made_library(hops=2)


def number(rng: random.Random) -> str:
    return str(rng.randint(1_000_000, 9_999_999))


def random_uuid(rng: random.Random) -> str:
    return str(uuid.UUID(int=rng.getrandbits(128), version=4))
