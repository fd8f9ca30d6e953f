"""One interface to the two kinds of tokenizers that encode training text."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from hylo_megatron.convert.tokenizer_files import (
    check_model_beside,
    has_tokenizer,
    identity_of,
    open_sentencepiece,
    open_tokenizer,
    tokenizer_identity,
)
from hylo_megatron.data.chat_template import ChatTemplate
from hylo_megatron.errors import HyLoError

DOCUMENT_END = ("<|endoftext|>", "<|end_of_text|>")  # preferred to eos, which ends a turn in chat models


@dataclass(frozen=True)
class TextTokenizer:
    """A tokenizer for training text.

    ``vocab_size``: number of ids. ``rows``: largest id plus one. ``fingerprint``: hash of the tokenizer's identity.

    ``encode``: texts to lists of ids, without special tokens. ``render``: the chat template, or None. ``locate``:
    texts to ids and each token's ``(start, end)`` in the text; None if the tokenizer does not know these.
    """

    vocab_size: int
    eod_id: int
    encode: Callable[[list[str]], list[list[int]]]
    render: ChatTemplate | None
    locate: Callable[[list[str]], list[tuple[list[int], list[tuple[int, int]]]]] | None
    rows: int
    fingerprint: str


def load_tokenizer(path: Path, workers: int, eod_token: str | None = None) -> TextTokenizer:
    """Load a Hugging Face folder with tokenizer.json, or a sentencepiece ``.model`` file. ``workers``: threads."""
    if path.is_file() and path.suffix == ".model":
        return _sentencepiece(path, workers, eod_token)
    if path.is_dir() and has_tokenizer(path):
        return _hugging_face(path, workers, eod_token)
    raise HyLoError(f"{path}: expected a folder with tokenizer.json, or a sentencepiece .model file")


def _hugging_face(path: Path, workers: int, eod_token: str | None) -> TextTokenizer:
    # The `tokenizers` package creates its thread pool at its first use and reads these variables then.
    os.environ["RAYON_NUM_THREADS"] = str(workers)
    os.environ["TOKENIZERS_PARALLELISM"] = "true" if workers > 1 else "false"
    tokenizer = open_tokenizer(path)
    identity = identity_of(tokenizer)
    check_model_beside(path, identity)
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    wanted = [eod_token] if eod_token else [*DOCUMENT_END, tokenizer.eos_token]
    eod_id = next((i for t in wanted if t and (i := backend.token_to_id(t)) is not None), None)
    if eod_id is None:
        raise HyLoError(f"{path}: no end-of-document token among {wanted}: name one with --eod-token")

    def encode(texts: list[str]) -> list[list[int]]:
        return [item.ids for item in backend.encode_batch_fast(texts, add_special_tokens=False)]

    def locate(texts: list[str]) -> list[tuple[list[int], list[tuple[int, int]]]]:
        return [(item.ids, item.offsets) for item in backend.encode_batch(texts, add_special_tokens=False)]

    template = ChatTemplate.of(tokenizer)
    return TextTokenizer(
        identity.size, eod_id, encode, template, locate, identity.largest_id + 1, identity.fingerprint
    )


def _sentencepiece(path: Path, workers: int, eod_token: str | None) -> TextTokenizer:
    processor = open_sentencepiece(path)
    eod_id = processor.piece_to_id(eod_token) if eod_token else processor.eos_id()
    if eod_id < 0 or (eod_token and eod_id == processor.unk_id()):
        raise HyLoError(f"{path}: no end-of-document token {eod_token or '(eos)'}: name one with --eod-token")
    size = processor.vocab_size()

    def encode(texts: list[str]) -> list[list[int]]:
        return processor.encode(texts, out_type=int, num_threads=workers)

    return TextTokenizer(size, eod_id, encode, None, None, size, tokenizer_identity(path).fingerprint)
