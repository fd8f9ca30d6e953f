"""Tokens into Megatron's .bin and .idx: documents as they are, or sequences of one length cut from them."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from hylo_megatron.checkpoint import disk
from hylo_megatron.errors import HyLoError


@dataclass
class Counts:
    """What was written. ``tokens`` counts those in the .bin file, end-of-document tokens included."""

    documents: int = 0
    empty: int = 0
    skipped: int = 0  # too short for one sequence, where documents are not joined
    longest_skipped: int = 0  # tokens
    tokens: int = 0
    sequences: int = 0
    dropped_tokens: int = 0
    unlearnt: int = 0  # sequences that were dropped because none of their tokens is learnt


@dataclass
class TokenWriter:
    """Feeds encoded pieces to an ``IndexedDatasetBuilder``; ``pack_length`` in tokens, None keeps documents whole.

    Packed sequences run on from one document into the next, each closed by ``eod_id``; with ``long_documents`` every
    sequence lies inside one document, nothing is added to it, and what does not fill one is dropped. ``mask_file``
    gets a byte for every token of packed sequences: whether it is learnt. A sequence without any such token is
    dropped: a step on it would cost as much as any other and teach nothing.
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
        """Joined documents are always separated, or the reader could not tell where one begins."""
        return (self.append_eod or self.pack_length is not None) and not self.long_documents

    def add(self, ids: list[int], last: bool, learnt: bytes = b"") -> None:
        """Takes the next ``ids`` of the open document, which ends here if ``last``; ``learnt``: see ``mask_file``."""
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
            # a document of any size must not pile up in memory: its tokens go first, its length with its last piece
            self.builder.data_file.write(self._array(self.pending).tobytes())
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
        self.builder.add_document(self._array(ids), [length])
        self.counts.tokens += length
        self.counts.sequences += 1

    def _array(self, ids: list[int]):
        import numpy

        return numpy.array(ids, dtype=self.builder.dtype)


@contextmanager
def token_files(out: Path, vocab_size: int, others: tuple[str, ...]) -> Iterator[tuple[object, dict[str, Path]]]:
    """Yields the builder of ``out``.bin and .idx, and paths to write the files with the suffixes ``others`` to.

    All files appear when the block ends, none if it fails. HyLoError if the disk is full.
    """
    builder_class, dtype = _indexed_dataset(vocab_size)
    partial = {suffix: Path(f"{out}.partial{suffix}") for suffix in (".bin", ".idx", *others)}
    out.parent.mkdir(parents=True, exist_ok=True)
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
