"""Rows of tokens that layers are measured on: text, and retrieval samples whose answers are marked.

Legend: B rows, S tokens of a row.
"""

from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from hylo_megatron.convert.tokenizer_files import tokenizer_identity
from hylo_megatron.data.token_files import check_made_with, check_token_files, read_answers, read_summary
from hylo_megatron.errors import HyLoError
from hylo_megatron.init.calibration import calibration_tokens

REMEDY = "expected samples of hylo make-retrieval"


@dataclass(frozen=True, kw_only=True)
class Rows:
    """``text_BS``: tokens of text. ``samples_BS``: retrieval samples, ``answers_BS``: True at tokens of answers."""

    text_BS: Tensor
    samples_BS: Tensor | None = None
    answers_BS: Tensor | None = None

    def digest(self) -> str:
        """Return a digest of all rows."""
        found = sha256()
        for tensor in (self.text_BS, self.samples_BS, self.answers_BS):
            if tensor is not None:
                found.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode() + tensor.numpy().tobytes())
        return found.hexdigest()[:16]


def read_text(path: Path, tokenizer: Path, measured: int, trained: int, length: int, form: str | None) -> Tensor:
    """Return rows of ``length`` tokens of a text file or token files: to measure on, then to train on.

    ``measured`` and ``trained`` are tokens, ``form`` is the format of a text file. Raises ``HyLoError``.
    """
    if measured < 2 * length:
        raise HyLoError(f"--tokens {measured}: expected at least two rows of --length {length}")
    rows = measured // length + trained // length
    flag = "--train-tokens" if trained else "--tokens"
    return calibration_tokens(path, tokenizer, rows * length, length, flag, form)


def read_samples(prefix: Path, tokenizer: Path, count: int, more: int = 0) -> tuple[Tensor, Tensor]:
    """Return the first ``count`` samples, up to ``more`` others, and their answers' marks. Raises ``HyLoError``."""
    identity = tokenizer_identity(tokenizer)
    check_token_files(prefix, identity.largest_id + 1)
    check_made_with(prefix, identity, tokenizer)
    summary = read_summary(prefix, ("dtype", "sequences", "pack_length"))
    shape = summary["sequences"], summary["pack_length"]
    if shape[0] < count:
        raise HyLoError(f"--retrieval {prefix}: has {shape[0]} samples, expected {count}; make more of them")
    count = min(count + more, shape[0])
    ids = np.memmap(f"{prefix}.bin", np.dtype(summary["dtype"]), "r")
    if ids.size != shape[0] * (shape[1] or 0):
        raise HyLoError(f"--retrieval {prefix}: {ids.size} tokens are not {shape[0]} rows of one length; {REMEDY}")
    samples = torch.from_numpy(ids[: count * shape[1]].reshape(count, -1).astype(np.int64))
    if (answers := read_answers(prefix, shape)) is None:
        raise HyLoError(f"{prefix}.answers.npy not found: {REMEDY}")
    return samples, torch.from_numpy(answers[:count] > 0)
