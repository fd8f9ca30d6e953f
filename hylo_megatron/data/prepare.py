"""Text files to Megatron's .bin and .idx: streamed, whole documents or packed sequences of one length."""

import argparse
import json
import os
import sys
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from hylo_megatron.data.documents import FORMATS, Piece, detect_format, read_documents
from hylo_megatron.data.tokenizers import TextTokenizer, load_tokenizer
from hylo_megatron.errors import HyLoError, command_line

BATCH_CHARACTERS = 1 << 21  # text held while a batch is encoded
SUFFIXES = (".bin", ".idx", ".json")


@dataclass
class Counts:
    """What was written. ``tokens`` counts those in the .bin file, end-of-document tokens included."""

    documents: int = 0
    empty: int = 0
    tokens: int = 0
    sequences: int = 0
    dropped_tokens: int = 0


@dataclass
class TokenWriter:
    """Feeds encoded pieces to an ``IndexedDatasetBuilder``; ``pack_length`` in tokens, None keeps documents whole."""

    builder: object
    dtype: type
    eod_id: int
    append_eod: bool
    pack_length: int | None
    counts: Counts = field(default_factory=Counts)
    pending: list[int] = field(default_factory=list)
    document_tokens: int = 0

    def add(self, ids: list[int], last: bool) -> None:
        """Takes the next ``ids`` of the open document, which ends here if ``last``."""
        self.pending += ids
        self.document_tokens += len(ids)
        if last and not self.document_tokens:
            self.counts.empty += 1
            return
        if last:
            self.counts.documents += 1
            # packing always separates documents, or the reader could not tell where one begins
            if self.append_eod or self.pack_length:
                self.pending.append(self.eod_id)
                self.document_tokens += 1
        if self.pack_length:
            self._cut()
        elif last:
            self._write(self.pending, self.document_tokens)
            self.pending = []
        else:
            # a document of any size must not pile up in memory: its tokens go first, its length with its last piece
            self.builder.data_file.write(self._array(self.pending).tobytes())
            self.pending = []
        if last:
            self.document_tokens = 0

    def close(self) -> None:
        self.counts.dropped_tokens = len(self.pending)

    def _cut(self) -> None:
        whole = len(self.pending) - len(self.pending) % self.pack_length
        for start in range(0, whole, self.pack_length):
            self._write(self.pending[start : start + self.pack_length], self.pack_length)
        del self.pending[:whole]

    def _write(self, ids: list[int], length: int) -> None:
        self.builder.add_document(self._array(ids), [length])
        self.counts.tokens += length
        self.counts.sequences += 1

    def _array(self, ids: list[int]):
        import numpy

        return numpy.array(ids, dtype=self.dtype)


def prepare(
    inputs: list[Path],
    tokenizer_path: Path,
    out: Path,
    form: str | None = None,
    text_key: str = "text",
    pack_length: int | None = None,
    workers: int = 1,
    append_eod: bool = True,
    eod_token: str | None = None,
) -> dict:
    """Writes ``out``.bin, .idx and .json and returns what the .json says. HyLoError names the bad file and line."""
    if pack_length is not None and pack_length < 2:
        raise HyLoError(f"--pack-length {pack_length}: expected at least 2 tokens")
    for path in inputs:
        if not path.is_file():
            raise HyLoError(f"{path}: no such file")
    forms = [form or detect_format(path) for path in inputs]
    tokenizer = load_tokenizer(tokenizer_path, workers, eod_token)
    if "chat" in forms and tokenizer.render is None:
        raise HyLoError(
            f"{tokenizer_path}: has no chat template, which {inputs[forms.index('chat')]} needs: "
            "use an instruct model's tokenizer"
        )
    builder_class, dtype = _indexed_dataset(tokenizer.vocab_size)
    partial = {suffix: Path(f"{out}.partial{suffix}") for suffix in SUFFIXES}
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        writer = TokenWriter(
            builder_class(str(partial[".bin"]), dtype=dtype), dtype, tokenizer.eod_id, append_eod, pack_length
        )
        try:
            _encode_all(inputs, forms, text_key, tokenizer, writer)
        except BaseException:
            writer.builder.data_file.close()
            raise
        writer.close()
        if not writer.counts.sequences:
            raise HyLoError(_nothing_written(inputs, writer.counts, pack_length))
        writer.builder.finalize(str(partial[".idx"]))
        counts = writer.counts
        summary = {
            "tokens": counts.tokens,
            "documents": counts.documents,
            "sequences": counts.sequences,
            "pack_length": pack_length,
            "dropped_tokens": counts.dropped_tokens,
            "empty_documents": counts.empty,
            "tokenizer": str(tokenizer_path),
            "vocab_size": tokenizer.vocab_size,
            "eod_id": tokenizer.eod_id,
            "append_eod": bool(append_eod or pack_length),
            "dtype": dtype.__name__,
            "inputs": [str(p) for p in inputs],
        }
        partial[".json"].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
        for suffix in SUFFIXES:
            os.replace(partial[suffix], f"{out}{suffix}")
    except OSError as error:
        if error.filename:  # names itself
            raise
        raise HyLoError(f"cannot write {out}.bin ({error.strerror}): free space, or choose another --out") from error
    finally:
        for path in partial.values():
            path.unlink(missing_ok=True)
    return summary


def _indexed_dataset(vocab_size: int):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about Transformer Engine and Apex, which play no part here
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    return IndexedDatasetBuilder, DType.optimal_dtype(vocab_size)


def _encode_all(
    inputs: list[Path], forms: list[str], text_key: str, tokenizer: TextTokenizer, writer: TokenWriter
) -> None:
    with _progress(sum(path.stat().st_size for path in inputs)) as advance:
        for path, form in zip(inputs, forms, strict=True):
            for batch in _batches(read_documents(path, form, text_key, tokenizer.render)):
                encoded = tokenizer.encode([piece.text for piece in batch])
                for piece, ids in zip(batch, encoded, strict=True):
                    writer.add(ids, piece.last)
                advance(sum(piece.size for piece in batch), sum(map(len, encoded)))


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
    if counts.documents:
        return f"{names}: {counts.dropped_tokens} tokens, too few for one sequence of --pack-length {pack_length}"
    return f"{names}: no text found ({counts.empty} empty documents)"


@contextmanager
def _progress(total_bytes: int):
    """Yields ``advance(bytes, tokens)``, which shows tokens per second: a tqdm bar if there is a terminal for it."""
    began, tokens, done, shown = time.monotonic(), 0, 0, time.monotonic()
    bar = None
    if sys.stderr.isatty():
        try:
            from tqdm import tqdm

            bar = tqdm(total=total_bytes, unit="B", unit_scale=True, desc="tokenizing")
        except ImportError:
            pass

    def advance(more_bytes: int, more_tokens: int) -> None:
        nonlocal tokens, done, shown
        tokens, done, now = tokens + more_tokens, done + more_bytes, time.monotonic()
        rate = f"{tokens / 1e3 / max(now - began, 1e-6):.0f}K tokens/s"
        if bar is not None:
            bar.set_postfix_str(rate, refresh=False)
            bar.update(more_bytes)
        elif now - shown > 10:
            shown = now
            print(f"{100 * done / max(total_bytes, 1):.0f} %, {tokens / 1e6:.1f}M tokens, {rate}", flush=True)

    try:
        yield advance
    finally:
        if bar is not None:
            bar.close()


@command_line
def main(argv: list[str] | None = None) -> None:
    """Command line of ``tools/prepare_data.py``."""
    parser = argparse.ArgumentParser(description="Tokenize text into Megatron's .bin and .idx files.")
    parser.add_argument("--input", required=True, nargs="+", type=Path, metavar="FILE")
    parser.add_argument("--tokenizer", required=True, type=Path, help="Hugging Face folder or sentencepiece .model")
    parser.add_argument("--out", required=True, type=Path, metavar="PREFIX", help="writes PREFIX.bin, .idx and .json")
    parser.add_argument(
        "--format",
        choices=FORMATS,
        help="text: a file is a document; jsonl: a line is one; chat: "
        'lines of {"messages": [...]} through the chat template (default: seen from the file)',
    )
    parser.add_argument("--text-key", default="text", help="key of the text in jsonl (default %(default)s)")
    parser.add_argument("--pack-length", type=int, metavar="N", help="join documents, cut sequences of N tokens")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), metavar="N", help="tokenizer threads (default %(default)s)"
    )
    parser.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="end each document with the end-of-document token (default on; packing always does)",
    )
    parser.add_argument("--eod-token", help="default <|endoftext|> or <|end_of_text|> if there is one, else eos")
    arguments = parser.parse_args(argv)
    if arguments.workers < 1:
        raise HyLoError(f"--workers {arguments.workers}: expected 1 or more")
    began = time.monotonic()
    summary = prepare(
        arguments.input,
        arguments.tokenizer,
        arguments.out,
        arguments.format,
        arguments.text_key,
        arguments.pack_length,
        arguments.workers,
        arguments.append_eod,
        arguments.eod_token,
    )
    seconds = time.monotonic() - began
    what = f"{summary['documents']} documents, {summary['tokens'] / 1e6:.2f}M tokens"
    if summary["pack_length"]:
        what += (
            f" in {summary['sequences']} sequences of {summary['pack_length']}, the last "
            f"{summary['dropped_tokens']} tokens dropped"
        )
    print(f"{arguments.out}.bin: {what}, {os.path.getsize(f'{arguments.out}.bin') / 1e6:.1f} MB, {seconds:.1f} s")
