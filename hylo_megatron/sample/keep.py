"""The filter of sampled texts: no loops, no fragments, no copies of an earlier text.

The filter reads words only, so the files of an interrupted run have all that its continuation needs.
"""

import re
import zlib
from dataclasses import dataclass, field
from hashlib import blake2b

import numpy as np

GRAM = 4  # words of the runs by which a loop is found
WINDOW = 200  # words that are searched together for loops
SHINGLE = 5  # words of the runs by which texts are compared
HASHES, BANDS = 64, 16  # of MinHash; two texts are compared if they agree in a whole band of 4
WORD = re.compile(r"\w+|[^\w\s]")
REASONS = ("short", "unfinished", "looping", "copies", "near_copies")


@dataclass(frozen=True)
class Rules:
    """``shortest``: words of a text. ``repeats``: largest share of repeated runs of four words in any 200 words.
    ``alike``: share of common runs of five words (Jaccard) from which a text is a near copy of an earlier one.
    """

    shortest: int = 20
    repeats: float = 0.5
    alike: float = 0.7


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def looping(text_words: list[str], repeats: float) -> bool:
    """Return whether some window of the text has more than ``repeats`` of its runs of words twice."""
    for start in range(0, max(1, len(text_words) - WINDOW // 2), WINDOW // 2):
        part = text_words[start : start + WINDOW]
        grams = list(zip(*(part[shift:] for shift in range(GRAM)), strict=False))
        if grams and 1 - len(set(grams)) / len(grams) > repeats:
            return True
    return False


def _shingles(text_words: list[str]) -> np.ndarray:
    """Return distinct hashes, below 2**32, of the runs of SHINGLE words."""
    ends = max(1, len(text_words) - SHINGLE + 1)
    runs = {" ".join(text_words[start : start + SHINGLE]) for start in range(ends)}
    return np.array([zlib.crc32(run.encode("utf-8", "surrogatepass")) for run in runs], np.uint64)


@dataclass
class Keeper:
    """Filters texts in their order, and remembers the texts that it kept."""

    rules: Rules
    exact: set[bytes] = field(default_factory=set)
    bands: dict[tuple[int, bytes], list[int]] = field(default_factory=dict)
    signatures: list[np.ndarray] = field(default_factory=list)

    def __post_init__(self) -> None:
        factors, self._shifts = np.random.default_rng(0).integers(1 << 63, size=(2, HASHES, 1), dtype=np.uint64)
        self._factors = 2 * factors + np.uint64(1)  # odd numbers; products wrap around

    def refusal(self, text: str, whole: str | None = None) -> str | None:
        """Return why ``text`` is not kept, one of ``REASONS``; None if it is, and then later copies are not.

        ``whole``: what must not be a copy if that is more than the text, such as an answer with its question.
        """
        found = words(text)
        if len(found) < self.rules.shortest:
            return "short"
        if looping(found, self.rules.repeats):
            return "looping"
        found = found if whole is None else words(whole)
        key = blake2b(" ".join(found).encode("utf-8", "surrogatepass"), digest_size=8).digest()
        if key in self.exact:
            return "copies"
        hashes = (_shingles(found) * self._factors + self._shifts) >> np.uint64(32)
        signature = hashes.min(1).astype(np.uint32)
        keys = [(band, part.tobytes()) for band, part in enumerate(signature.reshape(BANDS, -1))]
        candidates = {at for band in keys for at in self.bands.get(band, ())}
        if any((self.signatures[at] == signature).mean() >= self.rules.alike for at in candidates):
            return "near_copies"
        self.exact.add(key)
        for band in keys:
            self.bands.setdefault(band, []).append(len(self.signatures))
        self.signatures.append(signature)
        return None
