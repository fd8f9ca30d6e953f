"""Check the JSON files of a tokenizer: complete, with the right types, and one id for each token. No torch."""

import json
from pathlib import Path
from typing import Annotated, NotRequired

from pydantic import Field
from typing_extensions import TypedDict  # pydantic refuses typing's TypedDict before Python 3.12

from hylo_megatron.errors import HyLoError, first_line
from hylo_megatron.json_file import Count, check, read_json

FAST, CONFIG = "tokenizer.json", "tokenizer_config.json"
SPECIAL, ADDED = "special_tokens_map.json", "added_tokens.json"
ADVICE = "copy the base model's tokenizer files again"


class _AddedToken(TypedDict):
    id: Count
    content: Annotated[str, Field(min_length=1)]


class _Model(TypedDict):
    vocab: dict[str, Count] | list[tuple[str, float]]


class _TokenizerJson(TypedDict):
    model: _Model
    added_tokens: NotRequired[list[_AddedToken] | None]


class _Content(TypedDict):
    content: str


class _Template(TypedDict):
    name: str
    template: str


_Special = NotRequired[str | _Content | None]


class _TokenizerConfig(TypedDict):
    tokenizer_class: NotRequired[str | None]
    chat_template: NotRequired[str | list[_Template] | dict[str, str] | None]
    added_tokens_decoder: NotRequired[dict[Annotated[str, Field(pattern=r"^\d{1,10}$")], _Content]]
    bos_token: _Special
    eos_token: _Special
    unk_token: _Special
    pad_token: _Special


def read_config(folder: Path) -> dict:
    path = folder / CONFIG
    if (folder / SPECIAL).is_file():
        read_json(folder / SPECIAL, advice=ADVICE)
    if not path.is_file():
        return {}
    config = read_json(path, advice=ADVICE)
    check(config, _TokenizerConfig, str(path), ADVICE)
    if config.get("fast_tokenizer_files"):
        raise HyLoError(f"{path}: fast_tokenizer_files names several; keep one as {FAST} and remove this field")
    return config


def token_ids(content: dict) -> dict[str, int]:
    """Return every token of a ``tokenizer.json`` with its id. Unigram models have a list instead of an object."""
    vocab, added = content["model"]["vocab"], content.get("added_tokens") or ()
    tokens = vocab if isinstance(vocab, dict) else {piece: number for number, (piece, _) in enumerate(vocab)}
    return tokens | {token["content"]: token["id"] for token in added}


def check_tokenizer_json(path: Path) -> None:
    """Refuse a file that is incomplete or has two ids for a token. Raises ``HyLoError``."""
    content = read_json(path, advice=ADVICE)
    check(content, _TokenizerJson, str(path), ADVICE)
    tokens, names = token_ids(content), {}
    if not tokens:
        raise HyLoError(f"{path}: the tokenizer is empty; {ADVICE}")
    for word, number in tokens.items():
        if names.setdefault(number, word) != word:
            raise HyLoError(f"{path}: tokens {names[number]!r} and {word!r} both have id {number}; {ADVICE}")
    from tokenizers import Tokenizer

    try:
        loaded = Tokenizer.from_str(json.dumps(content))
    except BaseException as error:  # noqa: BLE001  a panic of the tokenizers library is no Exception
        if isinstance(error, KeyboardInterrupt | SystemExit | MemoryError):
            raise
        raise HyLoError(f"{path}: not a tokenizer ({first_line(error)}); {ADVICE}") from None
    for token in content.get("added_tokens") or ():
        _check_claim(path, "added_tokens", token["content"], token["id"], loaded)


def check_claimed_ids(folder: Path, config: dict, backend) -> None:
    """Compare the ids of added tokens in other files with those of ``tokenizer.json``.

    A token that ``tokenizer.json`` lacks gets the next free id, whatever the other file says.
    """
    for number, token in config.get("added_tokens_decoder", {}).items():
        _check_claim(folder / CONFIG, "added_tokens_decoder", token["content"], int(number), backend)
    path = folder / ADDED
    for content, number in (read_json(path, dict[str, Count], ADVICE) if path.is_file() else {}).items():
        _check_claim(path, content, content, number, backend)


def _check_claim(path: Path, field: str, content: str, number: int, backend) -> None:
    if (found := backend.token_to_id(content)) != number:
        raise HyLoError(
            f"{path}: field {field} gives token {content!r} the id {number}, the tokenizer gives it {found}; {ADVICE}"
        )
