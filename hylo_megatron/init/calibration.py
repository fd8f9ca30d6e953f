"""Calibration text as token rows."""

import itertools
import json
import random
from pathlib import Path

import torch
from torch import Tensor

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


def calibration_tokens(path: str | Path, tokenizer_folder: str | Path, count: int, length: int) -> Tensor:
    """``[count / length, length]`` token ids, documents in a fixed order. Raises ``HyLoError`` when text runs out."""
    from transformers import AutoTokenizer

    path, rows = Path(path), max(2, count // length)
    if not path.is_file():
        raise HyLoError(f"{path} not found: --calibration wants a text or JSONL file")
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_folder)
    ids: list[int] = []
    # Files are often sorted by source: take documents from everywhere, the same ones each time.
    texts = list(itertools.islice(_texts(path, length), MOST_DOCUMENTS))
    random.Random(0).shuffle(texts)
    for text in texts:
        # A stretch of each document, so that a few long ones do not fill everything.
        ids += tokenizer(text[: 8 * length], add_special_tokens=False)["input_ids"][:length]
        ids.append(tokenizer.eos_token_id or 0)
        if len(ids) >= rows * length:
            return torch.tensor(ids[: rows * length]).view(rows, length)
    raise HyLoError(f"{path}: holds {len(ids)} tokens, calibration wants {rows * length}; lower --calibration-tokens")
