"""The tokenizer of a folder: its files, how every tool opens it, and its identity. No torch.

``tokenizer.json`` is the tokenizer that a model was trained with. transformers' classes that are named after a model
(``LlamaTokenizerFast``) build another tokenizer from its vocabulary, differently in each version of transformers. So
our tools open the file unchanged, and the folders that they write name a class that does so too.
"""

import hashlib
import inspect
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hylo_megatron import packages
from hylo_megatron.convert.tokenizer_json import (
    ADDED,
    ADVICE,
    CONFIG,
    FAST,
    SPECIAL,
    check_claimed_ids,
    check_tokenizer_json,
    read_config,
    token_ids,
)
from hylo_megatron.errors import HyLoError, first_line
from hylo_megatron.json_file import read_json

TEMPLATES = "additional_chat_templates"
SENTENCEPIECE = "tokenizer.model"
# tokenizers of folders without a tokenizer.json
SOURCES = (SENTENCEPIECE, "vocab.json", "vocab.txt", "tiktoken.model")
COPIED = (
    FAST, CONFIG, *SOURCES, "merges.txt", SPECIAL, ADDED, "chat_template.jinja",
    "chat_template.json", "generation_config.json",
)  # fmt: skip
PLAIN_CLASSES = ("PreTrainedTokenizerFast", "TokenizersBackend")  # these classes use tokenizer.json unchanged


@dataclass(frozen=True)
class TokenizerIdentity:
    """Facts that decide which ids a tokenizer gives.

    ``size``: number of ids. ``fingerprint``: equal for two tokenizers that turn every text into the same ids; BOS,
    EOS, chat templates and decoding do not matter.
    """

    size: int
    largest_id: int
    fingerprint: str


def tokenizer_identity(folder: str | os.PathLike) -> TokenizerIdentity:
    """Return the identity of a Hugging Face folder's tokenizer, or of a sentencepiece ``.model`` file.

    Raises ``HyLoError`` if the folder has no tokenizer or a malformed one.
    """
    path = Path(folder)
    if path.is_file() and path.suffix == ".model":
        return _sentencepiece_identity(path)
    content = hashlib.sha256()
    for name in (*COPIED, *(() if (path / FAST).is_file() else ("config.json",))):
        content.update((path / name).read_bytes() if (path / name).is_file() else b"none")
        content.update(name.encode())
    key = content.digest()
    if key not in _known:  # a teacher usually has the student's files
        _known[key] = identity_of(open_tokenizer(path))
    return _known[key]


_known: dict[bytes, TokenizerIdentity] = {}  # reading a vocabulary of 150,000 takes seconds


def identity_of(tokenizer) -> TokenizerIdentity:
    """Return the identity of ``tokenizer``, which ``open_tokenizer`` returned."""
    backend = tokenizer.backend_tokenizer
    ids, content = backend.get_vocab(with_added_tokens=True), json.loads(backend.to_str())
    return TokenizerIdentity(len(ids), max(ids.values()), _fingerprint(content))


def has_tokenizer(folder: str | os.PathLike) -> bool:
    return any((Path(folder) / name).is_file() for name in (FAST, *SOURCES))


def open_tokenizer(folder: str | os.PathLike):
    """Open the folder's tokenizer as a fast tokenizer of transformers. Raises ``HyLoError``.

    Without ``tokenizer.json`` transformers builds the tokenizer from the folder's other files.
    """
    path = Path(folder)
    config = read_config(path)
    if not has_tokenizer(path):
        raise HyLoError(f"{path / FAST} not found: {path} has no tokenizer; {ADVICE}")
    plain = (path / FAST).is_file()
    if plain:
        check_tokenizer_json(path / FAST)
    try:
        if plain:
            from transformers import PreTrainedTokenizerFast as Kind
        else:
            from transformers import AutoTokenizer as Kind  # imports torch
        defaults = _special_tokens_of_class(path, config) if plain else {}
        tokenizer = Kind.from_pretrained(path, local_files_only=True, trust_remote_code=False, **defaults)
    except Exception as error:  # noqa: BLE001  whatever transformers finds wrong
        raise HyLoError(f"{path}: transformers cannot load this tokenizer ({first_line(error)}); {ADVICE}") from error
    if not tokenizer.is_fast:
        raise HyLoError(f"{path}: this tokenizer has no fast form: save it with {FAST}")
    check_claimed_ids(path, config, tokenizer.backend_tokenizer)
    if not plain and (path / SENTENCEPIECE).is_file():
        _check_conversion(path / SENTENCEPIECE, tokenizer)
    return tokenizer


def _check_conversion(path: Path, tokenizer) -> None:
    """Compare with sentencepiece: transformers silently ignores some of its settings."""
    processor = open_sentencepiece(path)
    for text in ("Hello, world 123", "two  spaces", "a\nb\tc", "ﬁve ½ １２", "naïve 你好 🙂"):
        if tokenizer(text, add_special_tokens=False).input_ids != processor.encode(text):
            raise HyLoError(
                f"{path}: the tokenizer that transformers builds from it gives other ids for {text!r} than"
                f" sentencepiece; put the {FAST} beside it that the model was published with"
            )


def check_tokenizer(folder: str | os.PathLike, vocab_size: int) -> None:
    """Refuse a folder whose tokenizer gives ids for which the model has no rows. Padding rows are accepted.

    A folder without a tokenizer passes. Raises ``HyLoError``.
    """
    if has_tokenizer(folder):
        check_rows(tokenizer_identity(folder), vocab_size, folder)


def check_rows(identity: TokenizerIdentity, vocab_size: int, folder: str | os.PathLike) -> None:
    if identity.largest_id >= vocab_size:
        raise HyLoError(
            f"{Path(folder) / FAST}: the tokenizer makes ids up to {identity.largest_id}, the model's vocab_size is"
            f" {vocab_size}; they do not belong together: {ADVICE}, or remove the tokens that were added to it"
        )


def check_model_beside(folder: str | os.PathLike, identity: TokenizerIdentity) -> None:
    """Run ``check_rows`` with the model whose ``config.json`` is in the tokenizer's folder, if there is one."""
    path = Path(folder) / "config.json"
    rows = read_json(path).get("vocab_size") if path.is_file() else None
    if isinstance(rows, int):
        check_rows(identity, rows, folder)


def copy_companions(source: Path, target: Path, with_config: bool = True) -> None:
    """Copy tokenizer, chat templates and generation settings (and the config) into ``target``.

    Only files that transformers reads are copied. The copy has a ``tokenizer.json`` and names a class that uses this
    file unchanged, whatever ``source`` has.
    """
    target.mkdir(parents=True, exist_ok=True)
    for name in (*COPIED, *(("config.json",) if with_config else ())):
        if (source / name).is_file():
            shutil.copy2(source / name, target / name)
    templates = sorted(path for path in (source / TEMPLATES).glob("*.jinja") if path.is_file())
    for path in templates:
        (target / TEMPLATES).mkdir(exist_ok=True)
        shutil.copy2(path, target / TEMPLATES / path.name)
    if has_tokenizer(source):
        _write_plain_class(source, target)


def _write_plain_class(source: Path, target: Path) -> None:
    config = read_config(source)
    own_code = config.pop("auto_map", None)  # names Python files, which are not copied
    if (source / FAST).is_file() and config.get("tokenizer_class") in PLAIN_CLASSES and not own_code:
        return
    tokenizer = open_tokenizer(source)
    if not (source / FAST).is_file():
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
        tokenizer.backend_tokenizer.save(str(target / FAST))
    special = {name: getattr(tokenizer, name) for name in ("bos_token", "eos_token", "unk_token", "pad_token")}
    known = {name: token for name, token in special.items() if token is not None and name not in config}
    if (source / SPECIAL).is_file():  # transformers reads this file after the config
        known = {}
    merged = config | known | {"tokenizer_class": PLAIN_CLASSES[0]}
    (target / CONFIG).write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _special_tokens_of_class(folder: Path, config: dict) -> dict[str, str]:
    """Return the default special tokens of the folder's tokenizer class, as far as the vocabulary has them."""
    import transformers

    name = config.get("tokenizer_class") or PLAIN_CLASSES[0]
    named = None if name in PLAIN_CLASSES else getattr(transformers, name.removesuffix("Fast"), None)
    if not isinstance(named, type) or (folder / SPECIAL).is_file():
        return {}
    known = token_ids(read_json(folder / FAST))
    parameters = inspect.signature(named.__init__).parameters
    defaults = {f"{kind}_token": parameters.get(f"{kind}_token") for kind in ("bos", "eos", "unk", "pad")}
    return {
        key: value.default
        for key, value in defaults.items()
        if value is not None and isinstance(value.default, str) and key not in config and value.default in known
    }


def _fingerprint(content: dict) -> str:
    """Return a hash of everything in ``content`` (as tokenizers writes it) that decides which ids a text becomes."""
    flags = ["id", "content", "single_word", "lstrip", "rstrip", "normalized"]
    if content["normalizer"] is None:
        flags.remove("normalized")  # without a normalizer the flag changes nothing
    added = sorted(content["added_tokens"] or (), key=lambda token: token["id"])
    deciding: dict[str, Any] = {key: content[key] for key in ("model", "normalizer", "pre_tokenizer")}
    deciding["added_tokens"] = [{flag: token[flag] for flag in flags} for token in added]
    return hashlib.sha256(json.dumps(deciding, sort_keys=True).encode()).hexdigest()


def _sentencepiece_identity(path: Path) -> TokenizerIdentity:
    size = open_sentencepiece(path).vocab_size()
    return TokenizerIdentity(size, size - 1, hashlib.sha256(path.read_bytes()).hexdigest())


def open_sentencepiece(path: Path):
    """Return the processor of a sentencepiece ``.model`` file. Raises ``HyLoError``."""
    sentencepiece = packages.load("sentencepiece", f"{path}: reading it")
    try:
        return sentencepiece.SentencePieceProcessor(model_file=str(path))
    except (OSError, RuntimeError) as error:
        raise HyLoError(f"{path}: not a sentencepiece model ({first_line(error)})") from error
