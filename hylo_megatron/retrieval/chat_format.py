"""A tokenizer's chat template, split into the text before, between and after the messages."""

import random
from collections.abc import Callable
from dataclasses import dataclass

from hylo_megatron.errors import HyLoError, first_line
from hylo_megatron.retrieval import templates


@dataclass(frozen=True)
class ChatFormat:
    """The text around messages: ``head`` user ``ask`` assistant ``again`` user ``ask`` assistant ``close``.

    ``system``: the text before and after a system message, in place of ``head``; None if the template refuses one.
    ``first``: what introduces the first question after a text.
    """

    head: str
    system: tuple[str, str] | None
    ask: str
    again: str
    close: str
    first: str = ""

    @classmethod
    def of(cls, render: Callable[[list], str], where: object = "the tokenizer") -> "ChatFormat":
        """Return the format of the chat template of ``where``.

        Raises ``HyLoError`` if the template changes messages.
        """
        marks = [f"mark{number}mark" for number in range(5)]
        roles = ("system", "user", "assistant", "user", "assistant")
        messages = [{"role": role, "content": mark} for role, mark in zip(roles, marks, strict=True)]
        try:
            # templates may treat the last answer differently, and ours is always the last one when it is read
            head, _, again, ask, close = _between(render(messages[1:]), marks[1:])
        except Exception as error:  # templates are programs and may raise anything
            raise HyLoError(
                f"{where}: the chat template does not render messages as they are ({first_line(error)}); correct it,"
                " or give --tokenizer a copy of the folder without it: all samples are plain text then"
            ) from error
        try:
            before, after, *_ = _between(render(messages), marks)
        except Exception:
            return cls(head, None, ask, again, close)
        return cls(head, (before, after), ask, again, close)

    def begin(self, rng: random.Random) -> str:
        """Return the beginning of a conversation, up to the user's first words."""
        if self.system is None or rng.random() < 0.5:
            return self.head
        return rng.choice(templates.SYSTEMS).join(self.system)


def _between(text: str, marks: list[str]) -> list[str]:
    parts = []
    for mark in marks:
        before, found, text = text.partition(mark)
        if not found:
            raise ValueError(f"a message is missing in {text!r}")
        parts.append(before)
    return [*parts, text]


PLAIN = ChatFormat("", None, ask="\nAnswer: ", again="\nQuestion: ", close="\n", first="Question: ")
