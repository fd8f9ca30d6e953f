"""Sentences and words of text files, for haystacks."""

import re
from pathlib import Path

from transformers import PreTrainedTokenizerBase

from hylo_megatron.data.documents import read_texts
from hylo_megatron.errors import HyLoError

ADJECTIVE_ENDINGS = ("able", "ible", "less", "ful", "ous", "ive", "ish", "ant", "ent", "ary", "ic", "al")
NOUN_IN_TEXT = re.compile(r"\b(?:the|a|an) ([a-z]{4,9})(?=[.,;:)])")
WORD = re.compile(r"(?<![\w'-])[a-z]{4,9}(?![\w'-])")
MIN_WORDS = 8


def read_some(file: Path, tokenizer: PreTrainedTokenizerBase, max_chars: int, form: str | None = None) -> str:
    """Return the first documents of a file, about ``max_chars`` characters, with white space folded."""
    parts, size = [], 0
    for text in read_texts(file, tokenizer, form=form):
        parts.append(re.sub(r"\s+", " ", text[: max_chars - size]).strip())
        size += len(parts[-1])
        if size >= max_chars:
            break
    return "\n".join(parts)


def sentences_of(prose: str, min_chars: int = 20, max_chars: int = 400) -> list[str]:
    """Return sentences in reading order, without fragments and run-on lines."""
    pieces = (piece.strip() for piece in re.split(r"(?<=[.!?])\s+", prose))
    return [piece for piece in pieces if min_chars < len(piece) < max_chars]


def key_words(prose: str) -> tuple[list[str], list[str]]:
    """Return adjectives and nouns of 4 to 9 lower-case letters, guessed from endings and from preceding articles.

    If the text is too small for the guess, both lists have all its words.
    """
    words = sorted(set(WORD.findall(prose)))
    adjectives = [word for word in words if word.endswith(ADJECTIVE_ENDINGS)]
    nouns = sorted(set(NOUN_IN_TEXT.findall(prose)) - set(adjectives))
    if len(words) < 2:
        raise HyLoError("the prose file has no words of 4 to 9 lower-case letters to make needle keys of: use prose")
    return (adjectives if len(adjectives) >= MIN_WORDS else words, nouns if len(nouns) >= MIN_WORDS else words)
