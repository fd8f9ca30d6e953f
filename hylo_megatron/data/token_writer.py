"""Tokens to Megatron's .bin and .idx, as complete documents or as sequences of one length."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

import numpy as np

from hylo_megatron.checkpoint import disk
from hylo_megatron.errors import HyLoError
from hylo_megatron.files import only_writer


@dataclass
class Counts:
    """Counts of what was written. ``tokens`` counts those in the .bin file, including end-of-document tokens."""

    documents: int = 0
    empty: int = 0
    skipped: int = 0  # documents too short for one sequence, if documents are not joined
    longest_skipped: int = 0  # tokens of the longest skipped document
    tokens: int = 0
    sequences: int = 0
    dropped_tokens: int = 0
    unlearnt: int = 0  # sequences that were dropped because the loss mask has none of their tokens


@dataclass
class TokenWriter:
    """Writes encoded pieces to an ``IndexedDatasetBuilder``.

    ``pack_length``: tokens per sequence; None keeps documents complete. Packed sequences continue from one document
    into the next, and ``eod_id`` ends each document. With ``long_documents`` every sequence lies inside one document,
    nothing is added, and the rest of the document is dropped.

    ``mask_file`` gets the loss mask, a byte for every token of packed sequences. A sequence without any token in the
    mask is dropped, because a step on it would cost as much as any other and teach nothing.
    """

    builder: object
    eod_id: int
    append_eod: bool
    pack_length: int | None
    long_documents: bool = False
    mask_file: BinaryIO | None = None
    counts: Counts = field(default_factory=Counts)
    pending: list[int] = field(default_factory=list)
    pending_mask: bytearray = field(default_factory=bytearray)
    document_tokens: int = 0

    @property
    def closes_documents(self) -> bool:
        """Return whether ``eod_id`` ends each document. Joined documents are always separated."""
        return (self.append_eod or self.pack_length is not None) and not self.long_documents

    def add(self, ids: list[int], last: bool, learnt: bytes = b"") -> None:
        """Add the next ``ids`` of the open document. ``last``: the document ends here. ``learnt``: their loss mask."""
        self.pending += ids
        self.pending_mask += learnt
        self.document_tokens += len(ids)
        if last and not self.document_tokens:
            self.counts.empty += 1
            return
        if last and self.closes_documents:
            self.pending.append(self.eod_id)
            self.pending_mask += learnt[-1:]
            self.document_tokens += 1
        if self.pack_length:
            self._cut()
        elif last:
            self._write(self.pending, self.document_tokens)
            self.pending = []
        else:
            # A document of any size must not fill the memory: its tokens are written now, its length with its last
            # piece.
            self.builder.data_file.write(np.array(self.pending, self.builder.dtype).tobytes())
            self.pending = []
        if last:
            self._end_document()

    def close(self) -> None:
        self.counts.dropped_tokens += len(self.pending)

    def _end_document(self) -> None:
        if self.long_documents:
            self.counts.dropped_tokens += len(self.pending)
            self.pending, self.pending_mask = [], bytearray()
        if self.long_documents and self.document_tokens < self.pack_length:
            self.counts.skipped += 1
            self.counts.longest_skipped = max(self.counts.longest_skipped, self.document_tokens)
        else:
            self.counts.documents += 1
        self.document_tokens = 0

    def _cut(self) -> None:
        whole = len(self.pending) - len(self.pending) % self.pack_length
        for start in range(0, whole, self.pack_length):
            end = start + self.pack_length
            if self.mask_file and not any(self.pending_mask[start + 1 : end]):  # the first token is never predicted
                self.counts.unlearnt += 1
                continue
            self._write(self.pending[start:end], self.pack_length)
            if self.mask_file:
                self.mask_file.write(self.pending_mask[start:end])
        del self.pending[:whole], self.pending_mask[:whole]

    def _write(self, ids: list[int], length: int) -> None:
        self.builder.add_document(np.array(ids, self.builder.dtype), [length])
        self.counts.tokens += length
        self.counts.sequences += 1


@contextmanager
def token_files(out: Path, vocab_size: int, others: tuple[str, ...]) -> Iterator[tuple[object, dict[str, Path]]]:
    """Yield the builder of ``out``.bin and .idx, and paths for the files with the suffixes ``others``.

    All files appear when the block ends, and none if the block fails. Raises ``HyLoError`` if the disk is full, or if
    another process writes the same files.
    """
    builder_class, dtype = _indexed_dataset(vocab_size)
    partial = {suffix: Path(f"{out}.partial{suffix}") for suffix in (".bin", ".idx", *others)}
    out.parent.mkdir(parents=True, exist_ok=True)
    with only_writer(Path(f"{out}.partial"), f"{out}.bin"):
        try:
            builder = builder_class(str(partial[".bin"]), dtype=dtype)
            try:
                yield builder, partial
                builder.finalize(str(partial[".idx"]))
            finally:
                builder.data_file.close()
            for suffix, path in partial.items():
                os.replace(path, f"{out}{suffix}")
        except OSError as error:
            written = sum(path.stat().st_size for path in partial.values() if path.exists())
            full = disk.cause_of(error) and disk.line(out, None, f"no space left after {disk.text(written)} of tokens")
            if full or not error.filename:  # other errors name their file
                raise HyLoError(
                    full or f"{out}.bin: cannot be written ({error.strerror}): choose another --out"
                ) from error
            raise
        finally:
            for path in partial.values():
                path.unlink(missing_ok=True)


def _indexed_dataset(vocab_size: int):
    from hylo_megatron.engine.register import installed

    with installed("importing"):
        from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    return IndexedDatasetBuilder, DType.optimal_dtype(vocab_size)
