"""Calibration text as token rows."""

import itertools
import json
import random
from pathlib import Path

import torch
from torch import Tensor

from hylo_megatron.data.token_files import check_token_files
from hylo_megatron.errors import HyLoError

MOST_DOCUMENTS = 50_000  # of a long file its beginning is enough


def _texts(path: Path, length: int):
    with path.open(encoding="utf-8") as file:
        if path.suffix == ".jsonl":
            for number, line in enumerate(file, 1):
                try:
                    yield json.loads(line)["text"]
                except (ValueError, KeyError, TypeError):
                    raise HyLoError(f'{path}:{number}: expected {{"text": ...}}') from None
        else:
            while text := file.read(8 * length):
                yield text


def _token_documents(prefix: Path, length: int, vocab_size: int):
    """The beginnings of a token file's documents (tools/prepare_data.py), without the end-of-document token."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    check_token_files(prefix, vocab_size)
    documents = IndexedDataset(str(prefix))
    for index in range(min(len(documents), MOST_DOCUMENTS)):
        yield documents[index][:-1][:length].tolist()  # a view would outlive the file that it looks into


def calibration_tokens(path: str | Path, tokenizer_folder: str | Path, count: int, length: int) -> Tensor:
    """``[count / length, length]`` token ids, documents in a fixed order. Raises ``HyLoError`` when text runs out.

    ``path``: a text or JSONL file, or the prefix of a token file.
    """
    from transformers import AutoTokenizer

    path, rows = Path(path), max(2, count // length)
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder, trust_remote_code=False)
    if Path(f"{path}.idx").is_file():
        documents = list(_token_documents(path, length, 1 + max(tokenizer.get_vocab().values())))
    elif path.is_file():
        documents = list(itertools.islice(_texts(path, length), MOST_DOCUMENTS))
    else:
        raise HyLoError(f"{path} not found: --calibration wants a text or JSONL file, or tokens of prepare_data.py")
    ids: list[int] = []
    # Files are often sorted by source: take documents from everywhere, the same ones each time.
    random.Random(0).shuffle(documents)
    for document in documents:
        if isinstance(document, str):
            document = tokenizer(document[: 8 * length], add_special_tokens=False)["input_ids"]
        # A stretch of each document, so that a few long ones do not fill everything.
        ids += [*document[:length], tokenizer.eos_token_id or 0]
        if len(ids) >= rows * length:
            return torch.tensor(ids[: rows * length]).view(rows, length)
    raise HyLoError(f"{path}: holds {len(ids)} tokens, calibration wants {rows * length}; lower --calibration-tokens")
