"""Pack tokenized documents: the same text at another sequence length, without tokenizing it again."""

import json
from dataclasses import asdict
from pathlib import Path

from hylo_megatron.data.token_files import check_token_files, read_summary
from hylo_megatron.data.token_writer import TokenWriter, token_files
from hylo_megatron.errors import HyLoError


def pack(source: Path, out: Path, length: int, long_documents: bool = False) -> dict:
    """Cut the documents of ``source``.bin/.idx into sequences of ``length`` tokens in ``out``, and return its summary.

    ``source`` was written by ``hylo prepare-data``. ``long_documents``: every sequence lies inside one document, as in
    that command. The summary is the contents of ``out``.json. Raises ``HyLoError`` if no document is long enough.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    described = read_summary(source, ("vocab_size", "eod_id"))
    check_token_files(source)
    documents, eod = IndexedDataset(str(source)), described["eod_id"]
    with token_files(out, described["vocab_size"], (".json",)) as (builder, partial):
        writer = TokenWriter(builder, eod, append_eod=True, pack_length=length, long_documents=long_documents)
        for ids in documents:
            writer.add(ids[: len(ids) - int(ids[-1] == eod)].tolist(), last=True)  # the writer ends documents itself
        writer.close()
        if not writer.counts.sequences:
            raise HyLoError(
                f"{source}: no document of {length} tokens, the longest has {writer.counts.longest_skipped}"
            )
        summary = described | asdict(writer.counts) | {"pack_length": length, "inputs": [str(source)]}
        partial[".json"].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary
