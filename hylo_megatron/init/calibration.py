"""Calibration text as token rows."""

import itertools
import random
from pathlib import Path

import torch
from torch import Tensor

from hylo_megatron.convert.tokenizer_files import check_model_beside, identity_of, open_tokenizer
from hylo_megatron.data.documents import MOST_DOCUMENTS, read_texts
from hylo_megatron.data.token_files import check_made_with, check_prefix, check_token_files
from hylo_megatron.errors import HyLoError


def _token_documents(prefix: Path, length: int, vocab_size: int):
    """Yield the first ``length`` tokens of a token file's documents, without the end-of-document token."""
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    check_token_files(prefix, vocab_size)
    documents = IndexedDataset(str(prefix))
    for index in range(min(len(documents), MOST_DOCUMENTS)):
        yield documents[index][:-1][:length].tolist()  # a view would outlive the file that it looks into


def calibration_tokens(path: str | Path, tokenizer_folder: str | Path, count: int, length: int,
                       flag: str = "--calibration-tokens", form: str | None = None) -> Tensor:  # fmt: skip
    """Return ``[count / length, length]`` token ids, documents in a fixed order. A higher count begins with the same.

    ``path``: a file of text, rows or chats as ``hylo prepare-data`` takes them, or the prefix of a token file.
    ``flag``: the one that sets ``count``, for the refusal. ``form``: the format of a file of text.
    Raises ``HyLoError`` when ``path`` holds too few tokens.
    """
    path, rows = Path(path), max(2, count // length)
    tokenizer = open_tokenizer(tokenizer_folder)
    identity = identity_of(tokenizer)
    check_model_beside(tokenizer_folder, identity)
    if Path(f"{path}.idx").is_file():
        if form:
            raise HyLoError(f"{path}: token files, which have no format; leave out --format")
        check_made_with(path, identity, tokenizer_folder)
        documents = list(_token_documents(path, length, identity.largest_id + 1))
    elif path.exists():
        check_prefix(path)
        texts = itertools.islice(read_texts(path, tokenizer, window=8 * length, form=form), MOST_DOCUMENTS)
        documents = [text[: 8 * length] for text in texts]
    else:
        raise HyLoError(f"{path}: no such file; --calibration takes a text file, or token files of hylo prepare-data")
    ids: list[int] = []
    # Files are often sorted by source: take documents from everywhere, the same ones each time.
    random.Random(0).shuffle(documents)
    for document in documents:
        if isinstance(document, str):
            document = tokenizer(document, add_special_tokens=False)["input_ids"]
        # Only the beginning of each document, so that a few long ones do not fill everything.
        ids += [*document[:length], tokenizer.eos_token_id or 0]
        if len(ids) >= rows * length:
            return torch.tensor(ids[: rows * length]).view(rows, length)
    raise HyLoError(f"{path}: holds {len(ids)} tokens, calibration needs {rows * length}; lower {flag}")
