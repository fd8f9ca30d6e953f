"""The tokenizer of a folder: which files it consists of, how every tool opens it, and its identity. No torch in here.

``tokenizer.json`` is what a model was trained with. Classes of transformers that are named after models build a
tokenizer of their own from its vocabulary, each version another one, so all tools here open the file as it stands.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from pydantic import Field

from hylo_megatron.errors import HyLoError
from hylo_megatron.json_file import Count, Object, check, read_json

FAST, CONFIG = "tokenizer.json", "tokenizer_config.json"
ADVICE = "copy the base model's tokenizer files again"


class _AddedToken(TypedDict):
    id: Count
    content: Annotated[str, Field(min_length=1)]


class _TokenizerJson(TypedDict):
    model: Object
    added_tokens: NotRequired[list[_AddedToken] | None]


@dataclass(frozen=True)
class TokenizerIdentity:
    """``size``: how many ids the tokenizer has. ``fingerprint``: equal for tokenizers that make equal ids of every
    text (BOS and EOS, chat templates and decoding left out)."""

    size: int
    largest_id: int
    fingerprint: str


def tokenizer_identity(folder: str | os.PathLike) -> TokenizerIdentity:
    """The identity of a Hugging Face folder's tokenizer, or of a sentencepiece ``.model`` file.

    Raises ``HyLoError`` for a folder without one, and for a malformed one.
    """
    path = Path(folder)
    if path.is_file() and path.suffix == ".model":
        return _sentencepiece_identity(path)
    backend = open_tokenizer(path).backend_tokenizer
    ids = backend.get_vocab(with_added_tokens=True)
    return TokenizerIdentity(len(ids), max(ids.values()), _digest(_behaviour(json.loads(backend.to_str()))))


def open_tokenizer(folder: str | os.PathLike):
    """The folder's tokenizer as transformers' ``PreTrainedTokenizerFast``. Raises ``HyLoError``."""
    path = Path(folder)
    check_tokenizer_json(path)
    from transformers import PreTrainedTokenizerFast

    try:
        tokenizer = PreTrainedTokenizerFast.from_pretrained(path, local_files_only=True)
    except Exception as error:  # noqa: BLE001  whatever transformers finds wrong
        raise HyLoError(f"{path}: transformers cannot load this tokenizer ({_first_line(error)}); {ADVICE}") from error
    return tokenizer


def check_tokenizer_json(folder: Path) -> None:
    """Raises ``HyLoError`` unless ``tokenizer.json`` is whole and each token has one id."""
    path = folder / FAST
    content = read_json(path, _TokenizerJson, ADVICE)
    raw = read_json(path)
    words = _vocabulary(raw["model"], path)
    added = {token["content"]: token["id"] for token in content.get("added_tokens") or ()}
    if not words and not added:
        raise HyLoError(f"{path}: the tokenizer is empty; {ADVICE}")
    names: dict[int, str] = {}
    for word, number in [*words.items(), *added.items()]:
        if names.setdefault(number, word) != word:
            raise HyLoError(f"{path}: tokens {names[number]!r} and {word!r} both have id {number}; {ADVICE}")
    try:
        from tokenizers import Tokenizer

        loaded = Tokenizer.from_str(json.dumps(raw))
    except BaseException as error:  # noqa: BLE001  a panic of tokenizers is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise HyLoError(f"{path}: not a tokenizer ({_first_line(error)}); {ADVICE}") from None
    for word, number in added.items():
        if loaded.token_to_id(word) != number:
            raise HyLoError(
                f"{path}: added token {word!r} has id {number}, and tokenizers gives it"
                f" {loaded.token_to_id(word)}; {ADVICE}"
            )


def _vocabulary(model: dict, path: Path) -> dict[str, int]:
    """Tokens and ids of a tokenizer model, whose kinds write them down as an object or, Unigram, as a list."""
    vocab = model.get("vocab")
    if not isinstance(vocab, list):
        return check({"vocab": vocab}, _Words, f"{path}: model", ADVICE)["vocab"]
    pieces = check({"vocab": vocab}, _Pieces, f"{path}: model", ADVICE)["vocab"]
    return {piece: number for number, (piece, _) in enumerate(pieces)}


class _Words(TypedDict):
    vocab: dict[str, Count]


class _Pieces(TypedDict):
    vocab: list[tuple[str, float]]


def _behaviour(content: dict) -> dict[str, Any]:
    """What decides which ids a text becomes, of a ``tokenizer.json`` that the tokenizers library wrote."""
    flags = ["id", "content", "single_word", "lstrip", "rstrip", "normalized"]
    if content["normalizer"] is None:
        flags.remove("normalized")
    added = sorted(content["added_tokens"] or (), key=lambda token: token["id"])
    return {
        "model": content["model"],
        "normalizer": content["normalizer"],
        "pre_tokenizer": content["pre_tokenizer"],
        "added_tokens": [{flag: token[flag] for flag in flags} for token in added],
    }


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sentencepiece_identity(path: Path) -> TokenizerIdentity:
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise HyLoError(f"{path}: reading it needs the package sentencepiece: pip install sentencepiece") from error
    try:
        size = SentencePieceProcessor(model_file=str(path)).vocab_size()
    except (OSError, RuntimeError) as error:
        raise HyLoError(f"{path}: not a sentencepiece model ({error})") from error
    return TokenizerIdentity(size, size - 1, hashlib.sha256(path.read_bytes()).hexdigest())


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:200]
