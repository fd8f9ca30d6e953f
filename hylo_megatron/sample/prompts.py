"""The prompts of rows: the start token alone, first sentences of a text, or instructions in the chat template."""

import functools
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from hylo_megatron.convert.tokenizer_files import open_tokenizer
from hylo_megatron.data import chats
from hylo_megatron.data.chat_template import ChatTemplate
from hylo_megatron.data.documents import detect_format, read_documents, read_texts
from hylo_megatron.data.rows import container, read_rows
from hylo_megatron.data.tokenizers import DOCUMENT_END
from hylo_megatron.errors import HyLoError, first_line

SENTENCE = re.compile(r"\s*(\S.*?[.!?][\"')\]]*|\S[^\n]*)(?=\s|$)", re.DOTALL)
SENTENCE_CHARACTERS = (20, 400)  # shorter and longer beginnings of documents are left out
INSTRUCTION_KEYS = ("instruction", "prompt", "question", "text")


@dataclass(frozen=True)
class Prompt:
    """The beginning of a row.

    ``ids``: what the teacher reads. ``text``: the part that may be kept in the training text. ``messages``: the
    conversation before the answer; None for documents.
    """

    ids: tuple[int, ...]
    text: str = ""
    messages: list[dict] | None = None


class Prompts:
    """Prompts by row number: each epoch has every prompt once, in an order that the seed decides."""

    def __init__(self, prompts: list[Prompt], seed: int):
        self.prompts, self.seed = prompts, seed
        self._order = functools.lru_cache(32)(self._new_order)  # rows are asked for in two places, far apart

    def __getitem__(self, row: int) -> Prompt:
        epoch, place = divmod(row, len(self.prompts))
        return self.prompts[self._order(epoch)[place]]

    def _new_order(self, epoch: int) -> np.ndarray:
        return np.random.default_rng([self.seed, epoch]).permutation(len(self.prompts))


class Teller:
    """The teacher's tokenizer: prompts to ids, and ids to text. ``extra_ends``: more ids that end a row."""

    def __init__(self, folder: Path, extra_ends: set[int] = frozenset()):
        self.folder, self.tokenizer = folder, open_tokenizer(folder)
        special = self.tokenizer.added_tokens_decoder.items()
        self.special = {i for i, token in special if token.special} | set(self.tokenizer.all_special_ids)
        self.ends = frozenset(self.special | extra_ends)

    def start(self, token: str | None) -> int:
        """Return the id that begins a document: ``token``, else what the tokenizer itself puts first, else the
        end-of-document token, which stood before each document when the teacher was trained on packed text.
        """
        tokenizer = self.tokenizer
        if token is not None:
            ids = self.plain(token)
            if len(ids) != 1:
                raise HyLoError(f"--start-token {token!r} is {len(ids)} tokens of {self.folder}, expected one")
            return ids[0]
        first = tokenizer("a").input_ids[:1]
        if first and first[0] in self.special:
            return first[0]
        known = tokenizer.get_vocab()
        for name in (*DOCUMENT_END, tokenizer.bos_token, tokenizer.eos_token):
            if name in known:
                return known[name]
        raise HyLoError(f"{self.folder}: its tokenizer has no token that begins a document: name one by --start-token")

    def plain(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def chat(self, messages: list[dict]) -> tuple[int, ...]:
        """Return the ids of ``messages`` and of what introduces the answer. Raises ``HyLoError``."""
        if not self.tokenizer.chat_template:
            raise HyLoError(f"{self.folder}: has no chat template, which --instructions needs: use an instruct model")
        ChatTemplate(self.tokenizer).choose(None, self.folder)
        try:
            text = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # templates are programs and may raise anything
            raise chats.Unusable(f"the chat template refuses it ({first_line(error)})") from None
        return self.plain(text)

    def text(self, ids: list[int]) -> str:
        """Return the text of ``ids``. A character whose last bytes are missing is left out."""
        return self.tokenizer.decode(ids, skip_special_tokens=True).rstrip("\ufffd")


def sentence_prompts(
    teller: Teller, file: Path, token: str | None, most: int, form: str | None = None
) -> list[Prompt]:
    """Return the first sentence of each document of ``file``, without repetitions.

    ``most``: tokens of a prompt. ``form``: the file's format; None: as its contents say.
    """
    begin, seen = teller.start(token), {}
    shortest, longest = SENTENCE_CHARACTERS
    for text in _beginnings(file, teller, form):
        found = SENTENCE.match(text)
        sentence = " ".join(found[1].split()) if found else ""
        if shortest <= len(sentence) <= longest:
            seen.setdefault(sentence)
    prompts = [Prompt((begin, *teller.plain(sentence)), sentence) for sentence in seen]
    return _fitting(prompts, most, file, f"first sentences of {shortest} to {longest} characters")


def _beginnings(file: Path, teller: Teller, form: str | None) -> Iterator[str]:
    """Yield the documents of ``file``; each paragraph of a plain text file is one."""
    if detect_format(file, form) == "text":
        for piece in read_documents(file, "text"):
            yield from re.split(r"\n\s*\n", piece.text)
    else:
        yield from read_texts(file, teller.tokenizer, form=form)


def instruction_prompts(
    teller: Teller, file: Path, key: str | None, most: int, form: str | None = None
) -> list[Prompt]:
    """Return the instructions of ``file``: chats up to their first question, or rows with an instruction.

    ``form``: chat or jsonl for rows of one kind; None: each row as it is.
    """
    keys = (key,) if key else INSTRUCTION_KEYS
    prompts, seen, refused = [], set(), []
    kind = container(file, "jsonl")
    for row in read_rows(file, kind, (*keys, "input", *chats.COLUMNS)):
        try:
            messages = _question(row.value, keys, form)
            ids = teller.chat(messages)
        except chats.Unusable as reason:
            refused.append(f"{row.where}: {reason}" if not refused else "")
            continue
        if ids not in seen:
            seen.add(ids)
            prompts.append(Prompt(ids, messages=messages))
    if not prompts and refused:
        raise HyLoError(f"{refused[0]}; no row of {file} can be used as an instruction")
    if refused:
        print(f"{file}: {len(refused)} rows cannot be used and were left out, the first is {refused[0]}")
    return _fitting(prompts, most, file, "instructions")


def _question(row: Any, keys: tuple[str, ...], form: str | None) -> list[dict]:
    """Return the messages of ``row`` up to the first one of the user. Raises ``Unusable``."""
    if not isinstance(row, dict):
        raise chats.Unusable(f"expected an object with one of {', '.join(keys)}, or a conversation")
    text = next((row[key] for key in keys if isinstance(row.get(key), str)), None)
    if form == "chat" or (text is None and form is None and any(name in row for name in chats.KEYS)):
        messages = chats.read_chat(row).messages
        first = next((i for i, message in enumerate(messages) if message["role"] == "user"), None)
        if first is None:
            raise chats.Unusable("it has no message of a user")
        return messages[: first + 1]
    if text is None:
        raise chats.Unusable(
            f"no text under {' or '.join(map(repr, keys))}{'' if form else ' and no conversation'}, the keys are"
            f" {', '.join(map(repr, row)) or 'none'}: name the right one with --text-key"
        )
    more = row.get("input")
    content = f"{text}\n\n{more}" if isinstance(more, str) and more.strip() else text
    if not content.strip():
        raise chats.Unusable("its instruction is empty")
    return [{"role": "user", "content": content}]


def _fitting(prompts: list[Prompt], most: int, file: Path, what: str) -> list[Prompt]:
    kept = [prompt for prompt in prompts if len(prompt.ids) <= most]
    if not kept:
        longer = f"; {len(prompts)} are longer than {most} tokens, half of --length" if prompts else ""
        raise HyLoError(f"{file}: no {what} to begin rows with{longer}")
    if len(kept) < len(prompts):
        left = len(prompts) - len(kept)
        print(f"{file}: {left} of {len(prompts)} prompts left out, longer than {most} tokens (half of --length)")
    return kept
