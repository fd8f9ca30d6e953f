"""Check before anything is loaded that token files belong to the models that will train on them."""

import argparse
import contextlib
from pathlib import Path

from hylo_megatron.config import Architecture
from hylo_megatron.convert.tokenizer_files import FAST, tokenizer_identity
from hylo_megatron.data.token_files import check_made_with, check_packed, check_token_files


def _without_weights(words: list[str]) -> list[str]:
    """Return the prefixes of a blend. As Megatron has it, every other word is a weight if all of these are numbers."""
    with contextlib.suppress(ValueError):
        if len(words) % 2 == 0 and all(float(word) is not None for word in words[::2]):
            words = words[1::2]
    return [word.strip() for word in words]


def prefixes(args: argparse.Namespace) -> list[str]:
    """Return the token files that ``--data-path`` and its like name, without the weights of a blend."""
    blends = (args.data_path, args.train_data_path, args.valid_data_path)
    return [prefix for words in blends if words for prefix in _without_weights(words)]


def check_data(
    prefixes: list[str], student: Architecture, teacher: Architecture, tokenizer: Path, seq_length: int | None = None
) -> None:
    """Refuse damaged token files, ids beyond the models' rows, tokens of another tokenizer, and another length.

    ``tokenizer``: the student's folder. Raises ``HyLoError``.
    """
    identity = tokenizer_identity(tokenizer) if (tokenizer / FAST).is_file() else None
    for prefix in dict.fromkeys(prefixes):
        check_token_files(prefix, min(student.vocab_size, teacher.vocab_size))
        if identity:
            check_made_with(prefix, identity, tokenizer)
    if seq_length:
        check_packed(prefixes, seq_length)
