"""A tokenizer's chat template: render conversations, and find the assistant's answers in the rendered text."""

import json
import re
from typing import Any, NamedTuple

from hylo_megatron.data.chats import REASONING, Chat, Unusable
from hylo_megatron.errors import HyLoError, first_line

# Two characters for private use: no template writes, changes or searches for these characters.
MARK = "\ue000{}\ue001"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Span(NamedTuple):
    """Position of an assistant's answer in a text.

    ``closed``: the token that ends the answer's turn lies inside the span; otherwise it follows the span.
    """

    start: int
    end: int
    closed: bool = False


class ChatTemplate:
    """The chat template of a tokenizer.

    ``tokenizer``: a tokenizer of transformers. ``name``: which template to use if the tokenizer has several.
    """

    def __init__(self, tokenizer, name: str | None = None):
        self.tokenizer, self.name = tokenizer, name
        self._prompt: str | None = None

    @classmethod
    def of(cls, tokenizer) -> "ChatTemplate | None":
        return cls(tokenizer) if tokenizer.chat_template else None

    def choose(self, name: str | None, where: Any) -> "ChatTemplate":
        """Return the template ``name``, or the only or the default one. Raises ``HyLoError`` if there is none."""
        found = self.tokenizer.chat_template
        names = sorted(found) if isinstance(found, dict) else []
        if name is not None and name not in names:
            has = f"its templates are {', '.join(names)}" if names else "it has one template, without a name"
            raise HyLoError(f"{where}: has no chat template {name!r}, {has}: correct --chat-template or leave it out")
        if names and name is None and "default" not in names:
            raise HyLoError(
                f"{where}: has the chat templates {', '.join(names)} and none is the default: choose one with"
                " --chat-template of hylo prepare-data, or rename one to default in the tokenizer's files"
            )
        return ChatTemplate(self.tokenizer, name)

    def __call__(self, messages: list, tools: list | None = None, prompt: bool = False) -> str:
        """Render ``messages``. ``prompt``: append the text that introduces the next answer."""
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self.name, tokenize=False, add_generation_prompt=prompt
        )

    def render(self, chat: Chat) -> tuple[Chat, str]:
        """Return ``chat`` as the template gets it, and its text. Raises ``Unusable`` if the template refuses."""
        calls = [call for message in chat.messages for call in message.get("tool_calls", ())]
        arguments = [call["function"]["arguments"] for call in calls]
        error = None
        try:
            text = self(chat.messages, chat.tools)
        except Exception as raised:  # templates are programs and may raise anything
            error = raised
        if arguments and (error or any(value and repr(value) in text for value in arguments)):
            # The template needs strings: it concatenates arguments with strings, or prints objects as Python does.
            chat = Chat([_with_strings(message) for message in chat.messages], chat.tools)
            try:
                return chat, self(chat.messages, chat.tools)
            except Exception as raised:
                error = error or raised
        if error:
            raise Unusable(f"the chat template refuses it ({first_line(error)})")
        return chat, text

    def answers(self, chat: Chat, text: str) -> tuple[Span, ...]:
        """Return the assistant's parts of ``text``; ``chat`` and ``text`` are from ``render``. Raises ``Unusable``."""
        if not any(message["role"] == "assistant" for message in chat.messages):
            raise Unusable("it has no message of an assistant")
        spans = self._marked(chat, text) or self._verbatim(chat, text) or self._by_difference(chat, text)
        if not spans:
            raise Unusable("the chat template leaves out every message of the assistant")
        return spans

    def _marked(self, chat: Chat, text: str) -> tuple[Span, ...]:
        """Find answers by the template's own ``generation`` marks, if it has any."""
        template = self.tokenizer.get_chat_template(self.name, chat.tools)
        if not GENERATION.search(template):
            return ()
        from transformers.utils.chat_template_utils import render_jinja_template

        (rendered,), (indices,) = render_jinja_template(
            conversations=[chat.messages], tools=chat.tools, chat_template=template,
            return_assistant_tokens_mask=True, **self.tokenizer.special_tokens_map,
        )  # fmt: skip
        return tuple(Span(start, end, True) for start, end in indices) if rendered == text else ()

    def _verbatim(self, chat: Chat, text: str) -> tuple[Span, ...]:
        """Find all answers with one more rendering, if ``text`` has every content unchanged or trimmed."""
        if any("content" not in message or set(message) & {"tool_calls", *REASONING} for message in chat.messages):
            return ()
        marks = [MARK.format(number) for number in range(len(chat.messages))]
        marked = [{**message, "content": mark} for message, mark in zip(chat.messages, marks, strict=True)]
        try:
            rest = self(marked, chat.tools)
        except Exception:
            return ()
        spans, at, rebuilt = [], 0, ""
        for message, mark in zip(chat.messages, marks, strict=True):
            before, found, rest = rest.partition(mark)
            content = message["content"] if found else ""
            if not text.startswith(content, at + len(before)):
                content = content.strip()
            rebuilt += before + content
            if message["role"] == "assistant" and found:
                spans.append(Span(self._turn_start(rebuilt, at, at + len(before)), len(rebuilt)))
            at = len(rebuilt)
        return tuple(spans) if rebuilt + rest == text else ()

    def _by_difference(self, chat: Chat, text: str) -> tuple[Span, ...]:
        """Find each message by comparing ``text`` with a rendering in which another message takes its place.

        The template may rewrite a message, but not move it.
        """
        spans, last = [], 0
        for index, message in enumerate(chat.messages):
            answer = message["role"] == "assistant"
            found = self._changes(chat, text, index)
            if found is None and answer:
                found = self._between_prefixes(chat, text, index)
            if found is None:
                if answer:
                    raise Unusable(f"the chat template changes message {index + 1}, its position cannot be found")
                continue
            if found.start == found.end and not answer:
                continue
            if found.start < last:
                raise Unusable(f"the chat template changes more than message {index + 1} when that message changes")
            # If the template leaves out the turn's tool calls, the model would learn an empty answer.
            empty = found.start == found.end and (found.end == len(text) or "tool_calls" in message)
            if answer and not empty:
                start = found.start if found.closed else self._turn_start(text, last, found.start)
                spans.append(found._replace(start=start))
            last = max(last, found.end)
        return tuple(spans)

    def _changes(self, chat: Chat, text: str, index: int) -> Span | None:
        mark, messages = MARK.format(index), list(chat.messages)
        messages[index] = {"role": messages[index]["role"], "content": mark}
        if messages[index]["role"] != "assistant":
            messages[index] = chat.messages[index] | messages[index]
        try:
            other = self(messages, chat.tools)
        except Exception:
            return None
        start = _common(text, other)
        return Span(start, len(text) - _common(text[start:][::-1], other[start:][::-1]))

    def _between_prefixes(self, chat: Chat, text: str, index: int) -> Span | None:
        """Return what lies between the earlier messages with the prompt for an answer, and those with the answer."""
        try:
            before = self(chat.messages[:index], chat.tools, prompt=True)
            behind = self(chat.messages[: index + 1], chat.tools).rstrip()
        except Exception:
            return None
        fits = text.startswith(behind) and behind.startswith(before)
        return Span(len(before), len(behind), True) if fits else None

    def _turn_start(self, text: str, low: int, start: int) -> int:
        """Return the position right after the prompt for an answer, where the model begins to write.

        What the template adds there, such as the start of reasoning, is part of the answer.
        """
        if self._prompt is None:
            question = [{"role": "user", "content": MARK}]
            try:
                without, with_prompt = self(question), self(question, prompt=True)
                self._prompt = with_prompt.removeprefix(without) if with_prompt.startswith(without) else ""
            except Exception:
                self._prompt = ""
        at = text.rfind(self._prompt, low, start) if self._prompt else -1
        return start if at < 0 else at + len(self._prompt)


def left_out(chat: Chat, text: str) -> str | None:
    """Return the first part of ``chat`` that ``text`` lacks, ignoring white space; None if it lacks nothing."""
    squeezed = None
    for number, message in enumerate(chat.messages, 1):
        parts = [("the content", message.get("content", ""))]
        parts += [("a tool call", call["function"]["name"]) for call in message.get("tool_calls", ())]
        parts += [("the reasoning", message[key]) for key in REASONING if key in message]
        for what, part in parts:
            if isinstance(part, str) and part not in text and json.dumps(part, ensure_ascii=False) not in text:
                squeezed = squeezed or "".join(text.split())
                if "".join(part.split()) not in squeezed:
                    return f"{what} of message {number}"
    functions = [tool.get("function", tool) for tool in chat.tools or ()]
    names = [function.get("name") for function in functions if isinstance(function, dict)]
    return "the tools" if any(isinstance(name, str) and name not in text for name in names) else None


def _with_strings(message: dict) -> dict:
    if "tool_calls" not in message:
        return message

    def dumped(function: dict) -> dict:
        return function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}

    return message | {"tool_calls": [call | {"function": dumped(call["function"])} for call in message["tool_calls"]]}


def _common(one: str, other: str) -> int:
    """Return the length of the common beginning, by bisection: Python compares slices faster than characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
