"""Whether token files are of the models that are to train on them; found out before anything is loaded."""

from pathlib import Path

from hylo_megatron.config import Architecture
from hylo_megatron.convert.tokenizer_files import FAST, TokenizerIdentity, tokenizer_identity
from hylo_megatron.data.token_files import check_token_files, read_summary
from hylo_megatron.errors import HyLoError


def check_data(prefixes: list[str], student: Architecture, teacher: Architecture, tokenizer: Path) -> None:
    """Raises ``HyLoError`` for damaged token files, ids beyond the models' rows, and tokens of another tokenizer.

    ``tokenizer``: the student's folder. Files that another program made have no ``PREFIX.json`` to compare with it.
    """
    identity = tokenizer_identity(tokenizer) if (tokenizer / FAST).is_file() else None
    for prefix in dict.fromkeys(prefixes):
        check_token_files(prefix, min(student.vocab_size, teacher.vocab_size))
        if identity and Path(f"{prefix}.json").is_file():
            _check_tokenizer(prefix, identity, tokenizer)


def _check_tokenizer(prefix: str, identity: TokenizerIdentity, tokenizer: Path) -> None:
    made = read_summary(prefix)
    same = made.get("tokenizer_fingerprint", identity.fingerprint) == identity.fingerprint
    if same and made.get("vocab_size", identity.size) == identity.size:
        return
    raise HyLoError(
        f"--data-path {prefix}: made with another tokenizer ({made.get('tokenizer', 'unknown')},"
        f" {made.get('vocab_size', 'unknown')} tokens) than the student's {tokenizer} ({identity.size} tokens);"
        f" make the tokens again with --tokenizer {tokenizer}"
    )
