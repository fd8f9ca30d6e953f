"""A token file as a haystack: passages of it, positions between its sentences, and the words for keys."""

import random
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from hylo_megatron.data.token_files import check_prefix, check_token_files, read_summary
from hylo_megatron.data.tokenizers import TextTokenizer
from hylo_megatron.errors import HyLoError

SLACK = 256  # tokens by which a passage may move to begin with a sentence
SPARSE = 100  # largest average distance, in tokens, between positions where a sentence can be hidden
VOCABULARY_SAMPLE = 64, 4096  # number of passages, and tokens of each, from which words are read
WORD = re.compile(r"(?<![\w'-])[a-z]{4,9}(?![\w'-])")
TOO_COMMON = 100  # the most frequent words ("that", "with") are no good keys
MOST_WORDS, FEWEST_WORDS = 4000, 20
RESERVED = ("magic", "special", "number")  # words of the evaluation; no key has these words or words that contain them


@dataclass(frozen=True)
class TokenKinds:
    """What the texts of a tokenizer's ids look like, as ``bool [vocabulary]`` arrays."""

    ends_sentence: np.ndarray
    ends_line: np.ndarray
    begins_word: np.ndarray
    newline: int

    @classmethod
    def of(cls, tokenizer) -> "TokenKinds":
        """Return the kinds of ``tokenizer``'s ids. The tokenizer is of the package tokenizers, with any model."""
        size = 1 + max(tokenizer.get_vocab(with_added_tokens=True).values())
        texts = tokenizer.decode_batch([[token] for token in range(size)], skip_special_tokens=True)
        pieces = [tokenizer.id_to_token(token) or "" for token in range(size)]
        ends = [text.rstrip("\"')”’").endswith((".", "!", "?")) for text in texts]
        lines = ["\n" in text for text in texts]
        # decoders may strip the space at the beginning of a piece, so the piece itself is checked too
        begins = [text[:1].isspace() or piece[:1] in ("Ġ", "▁") for text, piece in zip(texts, pieces, strict=True)]
        newline = tokenizer.encode("\n", add_special_tokens=False).ids[-1]
        return cls(np.array(ends), np.array(lines), np.array(begins), newline)


@dataclass(frozen=True)
class Haystack:
    """The documents of a .bin file, one after the other. ``size`` is in tokens.

    No file stays open: workers get a copy.
    """

    path: Path
    dtype: str
    size: int
    eod_id: int
    kinds: TokenKinds

    def read(self, start: int, count: int) -> np.ndarray:
        return np.fromfile(self.path, self.dtype, count, offset=start * np.dtype(self.dtype).itemsize)

    def passage(self, length: int, rng: random.Random, attempts: int = 1) -> np.ndarray:
        """Return ``length`` consecutive tokens, beginning with a sentence if one begins nearby.

        Tries ``attempts`` times to find a place inside one document. Otherwise ends of documents become line ends.
        """
        slack = min(SLACK, self.size - length)
        for _ in range(attempts):
            around = self.read(rng.randrange(self.size - length - slack + 1), length + slack)
            begin = next(iter(self.sentence_ends(around[: slack + 1])), 0)
            taken = around[begin : begin + length]
            ends = taken == self.eod_id
            if not ends.any():
                break
        return np.where(ends, np.array(self.kinds.newline, taken.dtype), taken)

    def sentence_ends(self, tokens: np.ndarray) -> np.ndarray:
        """Return the positions right after a sentence or a document, ascending; ``tokens[position:]`` comes next."""
        before, after = tokens[:-1], tokens[1:]
        # the dots in "3.14" and "os.path" do not end a sentence
        ends = self.kinds.ends_sentence[before] & self.kinds.begins_word[after]
        return np.flatnonzero(ends | (before == self.eod_id)) + 1

    def hiding_places(self, tokens: np.ndarray) -> np.ndarray:
        """Return the positions where a sentence can be inserted, ascending.

        These are the ends of sentences, and in code also the ends of lines. In text with hardly any of these, they are
        the gaps between words, or any position.
        """
        lines = np.flatnonzero(self.kinds.ends_line[tokens[:-1]]) + 1
        words = np.flatnonzero(self.kinds.begins_word[tokens[1:]]) + 1
        places = self.sentence_ends(tokens)
        for more in (lines, words, np.arange(1, len(tokens))):
            if len(places) < len(tokens) / SPARSE:
                places = np.union1d(places, more)
        return places


def open_haystack(prefix: Path, kinds: TokenKinds, tokenizer: TextTokenizer, shortest: int) -> Haystack:
    """Open tokens of ``hylo prepare-data``. Raises ``HyLoError`` if they are damaged, packed or too short."""
    path = Path(f"{prefix}.bin")
    if not path.is_file() or not Path(f"{prefix}.json").is_file():
        check_prefix(prefix)
        raise HyLoError(f"{path}, {prefix.name}.json: no such files, expected the files that hylo prepare-data writes")
    summary = read_summary(prefix, ("pack_length", "vocab_size", "tokens", "dtype", "eod_id"))
    if summary["pack_length"] is not None:
        raise HyLoError(f"{prefix}.bin holds packed sequences, expected documents: prepare without --pack-length")
    same = summary.get("tokenizer_fingerprint", tokenizer.fingerprint) == tokenizer.fingerprint
    if summary["vocab_size"] != tokenizer.vocab_size or not same:
        raise HyLoError(
            f"{prefix}.bin was made with a tokenizer of {summary['vocab_size']} tokens, this one has"
            f" {tokenizer.vocab_size} and gives other ids: give --tokenizer the same folder for both"
        )
    size = summary["tokens"]
    if path.stat().st_size != size * np.dtype(summary["dtype"]).itemsize:
        raise HyLoError(f"{path}: expected {size} tokens as {prefix}.json says: prepare the file again")
    if Path(f"{prefix}.idx").is_file():
        check_token_files(prefix)
    if size < shortest:
        raise HyLoError(f"{path}: {size} tokens of text, too few for samples of --length {shortest}: use more text")
    return Haystack(path, summary["dtype"], size, summary["eod_id"], kinds)


def common_words(haystack: Haystack, tokenizer) -> list[str]:
    """Return words of 4 to 9 lower-case letters from all over the haystack. Raises ``HyLoError`` for a few."""
    count, length = VOCABULARY_SAMPLE
    length = min(length, haystack.size)
    starts = np.linspace(0, haystack.size - length, count if haystack.size > length else 1, dtype=np.int64)
    texts = tokenizer.decode_batch([haystack.read(start, length).tolist() for start in starts])
    words = rank_words(texts)
    if len(words) < FEWEST_WORDS:
        raise HyLoError(
            f"{haystack.path}: {len(words)} words of 4 to 9 lower-case letters, expected {FEWEST_WORDS} or more "
            "to make keys of: use prose"
        )
    return words


def rank_words(texts: list[str]) -> list[str]:
    """Return words by falling frequency, without the most frequent and the reserved words."""
    seen = Counter(word for text in texts for word in WORD.findall(text))
    ranked = sorted(seen, key=lambda word: (-seen[word], word))
    ranked = [word for word in ranked if not any(reserved in word for reserved in RESERVED)]
    return ranked[min(TOO_COMMON, len(ranked) // 4) :][:MOST_WORDS]
