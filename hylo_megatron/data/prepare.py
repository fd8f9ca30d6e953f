"""Text files to Megatron's .bin and .idx, streamed, as complete documents or packed sequences of one length."""

import argparse
import json
import os
import time
from bisect import bisect_left
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from hylo_megatron.data.chat_template import Span
from hylo_megatron.data.documents import TEXT_KEY, Piece, Tally, chat_template, detect_format, read_documents
from hylo_megatron.data.formats import add_format
from hylo_megatron.data.hub import HubDataset, size_of, text_input
from hylo_megatron.data.token_writer import Counts, TokenWriter, token_files
from hylo_megatron.data.tokenizers import TextTokenizer, load_tokenizer
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import Parser, command_line
from hylo_megatron.progress import byte_progress

MASK = ".learnt.bin"  # loss mask: a byte for each token of packed sequences
BATCH_CHARACTERS = 1 << 21  # characters in memory while a batch is encoded
EXPLAINED = {  # counts of the summary that are explained to the user if they are not zero
    "empty_documents": "documents without text left out",
    "skipped_conversations": "conversations skipped",
    "sequences_without_answers": "sequences without a token of an answer dropped",
}


def prepare(
    inputs: list[Path | HubDataset],
    tokenizer_path: Path,
    out: Path,
    *,
    form: str | None = None,
    text_key: str | None = None,
    pack_length: int | None = None,
    workers: int = 1,
    append_eod: bool = True,
    eod_token: str | None = None,
    long_documents: bool = False,
    answers_only: bool = False,
    template_name: str | None = None,
) -> dict:
    """Write ``out``.bin, .idx and .json and return the contents of the .json.

    ``text_key``: the key of the text in files of rows. With None the key is the usual one, and rows may be chats.
    Raises ``HyLoError`` with the bad file and line.
    """
    if pack_length is not None and pack_length < 2:
        raise HyLoError(f"--pack-length {pack_length}: expected at least 2 tokens")
    if long_documents and pack_length is None:
        raise HyLoError("--long-documents cuts sequences of one length: give their tokens with --pack-length")
    forms = [detect_format(path, form, text_key) for path in inputs]
    tokenizer = load_tokenizer(tokenizer_path, workers, eod_token)
    if template_name and "chat" not in forms:
        raise HyLoError(f"--chat-template {template_name}: no input has conversations; leave it out, or --format chat")
    if "chat" in forms:
        chats = inputs[forms.index("chat")]
        tokenizer = replace(tokenizer, render=chat_template(tokenizer.render, chats, tokenizer_path, template_name))
    if answers_only:
        _check_answers_only(inputs, forms, tokenizer, tokenizer_path, pack_length)
    others, tally = (".json", MASK) if answers_only else (".json",), Tally()
    with token_files(out, tokenizer.rows, others) as (builder, partial), ExitStack() as stack:
        mask = stack.enter_context(partial[MASK].open("wb")) if answers_only else None
        writer = TokenWriter(builder, tokenizer.eod_id, append_eod, pack_length, long_documents, mask)
        _encode_all(inputs, forms, text_key or TEXT_KEY, tokenizer, writer, tally)
        writer.close()
        counts = writer.counts
        tally.check()
        if not counts.sequences:
            raise HyLoError(_nothing_written(inputs, counts, pack_length))
        summary = {
            "tokens": counts.tokens,
            "documents": counts.documents,
            "sequences": counts.sequences,
            "pack_length": pack_length,
            "dropped_tokens": counts.dropped_tokens,
            "empty_documents": counts.empty,
            "skipped_documents": counts.skipped,
            "skipped_conversations": tally.skipped,
            "changed_conversations": tally.changed,
            "sequences_without_answers": counts.unlearnt,
            "documents_with_lone_surrogates": tally.surrogates,
            "tokenizer": str(tokenizer_path),
            "tokenizer_fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "append_eod": writer.closes_documents,
            "dtype": builder.dtype.__name__,
            "inputs": [str(p) for p in inputs],
        }
        partial[".json"].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    if not answers_only:
        Path(f"{out}{MASK}").unlink(missing_ok=True)  # a mask left by earlier data of this name
    tally.report()
    return summary


def _check_answers_only(
    inputs, forms, tokenizer: TextTokenizer, tokenizer_path: Path, pack_length: int | None
) -> None:
    other = next((path for path, form in zip(inputs, forms, strict=True) if form != "chat"), None)
    if other:
        raise HyLoError(f'{other}: --answers-only needs chats, lines of {{"messages": [...]}}')
    if pack_length is None:
        raise HyLoError("--answers-only needs --pack-length: Megatron's own dataset reads no loss masks")
    if tokenizer.locate is None:
        raise HyLoError(
            f"{tokenizer_path}: --answers-only needs a tokenizer.json, which knows where each token is in the text"
        )


def _encode_all(
    inputs: list[Path], forms: list[str], text_key: str, tokenizer: TextTokenizer, writer: TokenWriter, tally: Tally
) -> None:
    masked, began = writer.mask_file is not None, time.monotonic()
    tokens = 0
    with byte_progress(sum(map(size_of, inputs)), "tokenizing", lines=True) as advance:
        for path, form in zip(inputs, forms, strict=True):
            read = 0
            for batch in _batches(read_documents(path, form, text_key, tokenizer.render, masked, tally)):
                texts = [piece.text for piece in batch]
                if masked:
                    located = tokenizer.locate(texts)
                    encoded = [ids for ids, _ in located]
                    masks = [learnt(where, p.answers) for (_, where), p in zip(located, batch, strict=True)]
                else:
                    encoded, masks = tokenizer.encode(texts), [b""] * len(batch)
                for piece, ids, mask in zip(batch, encoded, masks, strict=True):
                    writer.add(ids, piece.last, mask)
                tokens += sum(map(len, encoded))
                rate = tokens / 1e3 / max(time.monotonic() - began, 1e-6)
                advance(batch[-1].at - read, f"{tokens / 1e6:.1f}M tokens, {rate:.0f}K tokens/s")
                read = batch[-1].at


def learnt(offsets: list[tuple[int, int]], answers: tuple[Span, ...]) -> bytes:
    """Return the loss mask, a byte for each token: 1 in an answer and for the token after an answer that is not
    closed.

    The token after such an answer ends its turn.
    """
    mask, starts, stops = bytearray(len(offsets)), [start for start, _ in offsets], [stop for _, stop in offsets]
    for begin, end, closed in answers:
        first, behind = bisect_left(stops, begin + 1), bisect_left(starts, end) + (not closed)
        mask[first:behind] = bytes([1]) * len(mask[first:behind])
    return bytes(mask)


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    batch: list[Piece] = []
    held = 0
    for piece in pieces:
        batch.append(piece)
        held += len(piece.text)
        if held >= BATCH_CHARACTERS:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _nothing_written(inputs: list[Path], counts: Counts, pack_length: int | None) -> str:
    names = ", ".join(map(str, inputs))
    if counts.skipped:
        return (
            f"{names}: no document has the {pack_length} tokens of --pack-length, the longest has "
            f"{counts.longest_skipped}: use a smaller length, or leave out --long-documents"
        )
    if counts.unlearnt:
        return (
            f"{names}: none of the {counts.unlearnt} sequences of --pack-length {pack_length} holds a token of an"
            " answer: use a longer --pack-length, or leave out --answers-only"
        )
    if counts.documents:
        return f"{names}: {counts.dropped_tokens} tokens, too few for one sequence of --pack-length {pack_length}"
    return f"{names}: no text found ({counts.empty} empty documents)"


# fmt: off
def _flags() -> Parser:
    """Return the parser, whose names in parsed arguments are those of ``prepare``."""
    parser = Parser(description="Tokenize text into Megatron's .bin and .idx files.")
    add = parser.add_argument
    add("--input", nargs="+", type=text_input, default=[], metavar="FILE",
        help="files of text, rows or chats, or hf://NAME[:CONFIG][@SPLIT], a data set that the package datasets reads")
    add("--dataset", nargs="+", type=HubDataset.parse, default=[], metavar="NAME",
        help="the same data sets without hf:// (default split: train)")
    add("--tokenizer", required=True, type=Path, help="Hugging Face folder or sentencepiece .model")
    add("--out", required=True, type=Path, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    add_format(add, "--input and --dataset")
    add("--text-key", help=f"key or column of the text in rows (default {TEXT_KEY})")
    add("--chat-template", dest="template_name", metavar="NAME", help="which template, if the tokenizer has several")
    add("--pack-length", type=int, metavar="N", help="join documents, cut sequences of N tokens")
    add("--long-documents", action="store_true",
        help="cut each document of at least --pack-length tokens on its own, without joining any; skip shorter ones")
    add("--answers-only", action="store_true", help="train only on what the assistant says in chats (fine-tuning)")
    add("--workers", type=int, default=os.cpu_count(), metavar="N", help="tokenizer threads (default %(default)s)")
    add("--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="end each document with the end-of-document token (default on; packing always does)")
    add("--eod-token", help="default <|endoftext|> or <|end_of_text|> if there is one, else eos")
    return parser


# fmt: on


@command_line
def main(argv: list[str] | None = None) -> None:
    """Run ``hylo prepare-data``."""
    options = vars(_flags().parse_args(argv))
    if options["workers"] < 1:
        raise HyLoError(f"--workers {options['workers']}: expected 1 or more")
    inputs = [*options.pop("input"), *options.pop("dataset")]
    if not inputs:
        raise HyLoError("no text given: name files with --input, or data sets of a hub with --dataset")
    began, tokenizer, out = time.monotonic(), options.pop("tokenizer"), options.pop("out")
    summary = prepare(inputs, tokenizer, out, **options)
    seconds = time.monotonic() - began
    what = f"{summary['documents']} documents, {summary['tokens'] / 1e6:.2f}M tokens"
    if summary["pack_length"]:
        skipped = f"{summary['skipped_documents']} shorter documents skipped,"
        rest = skipped if options["long_documents"] else "the last"
        what += (
            f" in {summary['sequences']} sequences of {summary['pack_length']}, {rest} "
            f"{summary['dropped_tokens']} tokens dropped"
        )
    for key, words in EXPLAINED.items():
        what += f", {summary[key]} {words}" if summary[key] else ""
    print(f"{out}.bin: {what}, {os.path.getsize(f'{out}.bin') / 1e6:.1f} MB, {seconds:.1f} s")
