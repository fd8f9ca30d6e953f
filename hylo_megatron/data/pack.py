"""Packs documents that are tokens already: the same text at another sequence length, without tokenizing it again."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import TypedDict

from hylo_megatron import json_file
from hylo_megatron.data.token_writer import TokenWriter, token_files
from hylo_megatron.errors import HyLoError


class Described(TypedDict):
    """What is needed of a token file's .json."""

    eod_id: json_file.Count
    vocab_size: json_file.Size


def pack(source: Path, out: Path, length: int, long_documents: bool = False) -> dict:
    """Cuts ``source``.bin/.idx (documents, by ``prepare_data.py``) into sequences of ``length`` tokens in ``out``.

    ``long_documents``: as in ``prepare_data.py``, every sequence inside one document. Returns what ``out``.json says.
    HyLoError when nothing is long enough.
    """
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    described = json_file.read_json(Path(f"{source}.json"), advice="prepare the data again")
    json_file.check(described, Described, f"{source}.json", "prepare the data again")
    documents, eod = IndexedDataset(str(source)), described["eod_id"]
    with token_files(out, described["vocab_size"], (".json",)) as (builder, partial):
        writer = TokenWriter(builder, eod, append_eod=True, pack_length=length, long_documents=long_documents)
        for ids in documents:
            writer.add(ids[: len(ids) - int(ids[-1] == eod)].tolist(), last=True)  # the writer closes documents itself
        writer.close()
        if not writer.counts.sequences:
            raise HyLoError(
                f"{source}: no document of {length} tokens, the longest has {writer.counts.longest_skipped}"
            )
        summary = described | asdict(writer.counts) | {"pack_length": length, "inputs": [str(source)]}
        partial[".json"].write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")
    return summary
