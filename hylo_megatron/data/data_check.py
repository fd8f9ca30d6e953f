"""Check before anything is loaded that token files belong to the models that will train on them."""

from pathlib import Path

from hylo_megatron.config import Architecture
from hylo_megatron.convert.tokenizer_files import FAST, tokenizer_identity
from hylo_megatron.data.token_files import check_made_with, check_token_files


def check_data(prefixes: list[str], student: Architecture, teacher: Architecture, tokenizer: Path) -> None:
    """Refuse damaged token files, ids beyond the models' rows, and tokens of another tokenizer.

    ``tokenizer``: the student's folder. Raises ``HyLoError``.
    """
    identity = tokenizer_identity(tokenizer) if (tokenizer / FAST).is_file() else None
    for prefix in dict.fromkeys(prefixes):
        check_token_files(prefix, min(student.vocab_size, teacher.vocab_size))
        if identity:
            check_made_with(prefix, identity, tokenizer)
