"""Packed training samples that can only be answered by reading, as .bin, .idx, .json and .answers.npy."""

import json
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np

from hylo_megatron.convert.tokenizer_files import open_tokenizer
from hylo_megatron.data.token_writer import token_files
from hylo_megatron.data.tokenizers import TextTokenizer, load_tokenizer
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line, count, share, size
from hylo_megatron.parent import end_with_parent
from hylo_megatron.retrieval.chat_format import ChatFormat
from hylo_megatron.retrieval.haystack import TokenKinds, common_words, open_haystack
from hylo_megatron.retrieval.samples import SHORTEST, Sample, Samples

CHAT_SHARE = 0.4
CHUNK = 8  # samples that a worker makes at a time

_samples: Samples  # the samples of a worker process


def make_retrieval(
    haystack: Path,
    tokenizer: Path,
    out: Path,
    *,
    length: int,
    samples: int,
    seed: int = 1,
    chat_share: float | None = None,
    workers: int = 1,
) -> dict:
    """Write ``out``.bin, .idx, .json and .answers.npy, and return the contents of the .json.

    .answers.npy is uint8 ``[samples, length]``, with 1 where a token is part of an answer. ``chat_share``: None means
    ``CHAT_SHARE``, and 0 for a tokenizer without a chat template. Raises ``HyLoError`` for unusable input.
    """
    if length < SHORTEST:
        raise HyLoError(f"--length {length}: expected at least {SHORTEST} tokens")
    if samples < 1 or workers < 1:
        raise HyLoError(f"--samples {samples}, --workers {workers}: expected 1 or more of each")
    if chat_share is not None and not 0 <= chat_share <= 1:
        raise HyLoError(f"--chat-share {chat_share}: expected a share from 0 to 1")
    if os.path.abspath(out) == os.path.abspath(haystack):
        raise HyLoError(f"--out {out}: is the haystack, which it would replace; choose another prefix")
    recipe, checked = _open(haystack, tokenizer, length, seed, chat_share)
    kinds = {"chat": 0, "needles": 0}
    answer_tokens = 0
    with token_files(out, checked.rows, (".answers.npy", ".json")) as (builder, partial):
        with open(partial[".answers.npy"], "wb") as file:
            header = {"descr": "|u1", "fortran_order": False, "shape": (samples, length)}
            np.lib.format.write_array_header_1_0(file, header)
            for sample in _make_all(recipe, samples, workers):
                builder.add_document(sample.ids, [length])
                file.write(sample.answers.tobytes())
                kinds[sample.kind] += 1
                answer_tokens += int(sample.answers.sum())
        summary = {
            "kind": "retrieval",
            "tokens": samples * length,
            "documents": samples,
            "sequences": samples,
            "pack_length": length,
            "dropped_tokens": 0,
            "chat_samples": kinds["chat"],
            "needle_samples": kinds["needles"],
            "answer_tokens": answer_tokens,
            "chat_share": recipe.chat_share,
            "seed": seed,
            "tokenizer": str(tokenizer),
            "tokenizer_fingerprint": checked.fingerprint,
            "vocab_size": checked.vocab_size,
            "eod_id": recipe.haystack.eod_id,
            "append_eod": False,
            "dtype": builder.dtype.__name__,
            "inputs": [str(haystack)],
        }
        partial[".json"].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary


def _open(
    prefix: Path, tokenizer_path: Path, length: int, seed: int, chat_share: float | None
) -> tuple[Samples, TextTokenizer]:
    """Return the generator of all samples, and the tokenizer."""
    checked = load_tokenizer(tokenizer_path, 1)
    if not tokenizer_path.is_dir():
        raise HyLoError(f"{tokenizer_path}: expected a Hugging Face folder with tokenizer.json")
    chat = _chat_format(checked, tokenizer_path, chat_share)
    share = (CHAT_SHARE if chat else 0.0) if chat_share is None else chat_share
    # the same tokenizer again, for token positions in the text and for decoding
    tokenizer = open_tokenizer(tokenizer_path).backend_tokenizer
    tokenizer.no_truncation()
    tokenizer.no_padding()
    haystack = open_haystack(prefix, TokenKinds.of(tokenizer), checked, length)
    words = common_words(haystack, tokenizer)
    return Samples(tokenizer, haystack, words, chat, length, seed, share), checked


def _chat_format(tokenizer: TextTokenizer, folder: Path, chat_share: float | None) -> ChatFormat | None:
    if tokenizer.render:
        return ChatFormat.of(tokenizer.render.choose(None, folder), folder)
    if chat_share:
        raise HyLoError(
            f"{folder}: has no chat template, which --chat-share {chat_share} needs: use an instruct model's"
            " tokenizer, or give --chat-share 0"
        )
    return None


def _make_all(recipe: Samples, count: int, workers: int) -> Iterator[Sample]:
    """Yield samples 0 to ``count`` in order, whichever worker makes them."""
    if workers == 1:
        yield from map(recipe.make, range(count))
        return
    # spawned, not forked, because threads of torch and the tokenizer are running
    with ProcessPoolExecutor(workers, get_context("spawn"), _start_worker, (recipe,)) as pool:
        yield from pool.map(_make_one, range(count), chunksize=CHUNK)


def _start_worker(recipe: Samples) -> None:
    global _samples
    end_with_parent()
    _samples = recipe


def _make_one(index: int) -> Sample:
    return _samples.make(index)


@command_line
def main(argv: list[str] | None = None) -> None:
    """Run ``hylo make-retrieval``."""
    parser = Parser(description="Generate training samples that ask for facts hidden in a text, and mark the answers.")
    add = parser.add_argument
    add("--haystack", required=True, type=Path, metavar="PREFIX", help="made by hylo prepare-data, not packed")
    add("--tokenizer", required=True, type=Path, metavar="FOLDER", help="Hugging Face folder")
    add("--out", required=True, type=Path, metavar="PREFIX", help="writes PREFIX.bin, .idx, .json and .answers.npy")
    add("--length", required=True, type=size, metavar="N", help="tokens of a sample, such as 2049")
    add("--samples", required=True, type=size, metavar="N")
    add("--seed", type=count, default=1, help="default %(default)s")
    chats = "share of chats about short texts; the other samples hide facts in long texts"
    add("--chat-share", type=share, help=f"{chats} (default {CHAT_SHARE}, without a chat template 0)")
    add("--workers", type=size, default=1, metavar="N", help="processes (default %(default)s)")
    arguments = parser.parse_args(argv)
    began = time.monotonic()
    summary = make_retrieval(**vars(arguments))
    if arguments.chat_share is None and not summary["chat_share"]:
        print(f"{arguments.tokenizer} has no chat template, so there are no chats: all samples are plain text")
    print(
        f"{arguments.out}.bin: {summary['chat_samples']} chats and {summary['needle_samples']} samples with hidden "
        f"facts, {summary['tokens'] / 1e6:.2f}M tokens in sequences of {summary['pack_length']}, "
        f"{summary['answer_tokens'] / 1e3:.1f}K in answers, {time.monotonic() - began:.1f} s"
    )
