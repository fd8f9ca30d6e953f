"""A tokenizer's chat template: renders conversations, and tells where in the result an assistant speaks."""

import json
import re
from typing import Any, NamedTuple

from hylo_megatron.data.chats import REASONING, Chat, Unusable
from hylo_megatron.errors import HyLoError

# Two characters for private use: no template writes them, changes them or looks for them.
MARK = "\ue000{}\ue001"
GENERATION = re.compile(r"\{%-?\s*generation\s*-?%\}")


class Span(NamedTuple):
    """Where an assistant's answer stands in a text. ``closed``: what ends its turn is inside, otherwise behind it."""

    start: int
    end: int
    closed: bool = False


class ChatTemplate:
    """``tokenizer``: of transformers. ``name``: the template to use, of a tokenizer that has several."""

    def __init__(self, tokenizer, name: str | None = None):
        self.tokenizer, self.name = tokenizer, name
        self._prompt: str | None = None

    @classmethod
    def of(cls, tokenizer) -> "ChatTemplate | None":
        return cls(tokenizer) if tokenizer.chat_template else None

    def choose(self, name: str | None, where: Any) -> "ChatTemplate":
        """The template ``name``, or the only one or the default. Raises ``HyLoError`` if there is none."""
        found = self.tokenizer.chat_template
        names = sorted(found) if isinstance(found, dict) else []
        if name is not None and name not in names:
            has = f"its templates are {', '.join(names)}" if names else "it has one template, without a name"
            raise HyLoError(f"{where}: has no chat template {name!r}, {has}: correct --chat-template or leave it out")
        if names and name is None and "default" not in names:
            raise HyLoError(
                f"{where}: has the chat templates {', '.join(names)} and none is the default: choose one with"
                " --chat-template of tools/prepare_data.py"
            )
        return ChatTemplate(self.tokenizer, name)

    def __call__(self, messages: list, tools: list | None = None, prompt: bool = False) -> str:
        """``prompt``: with what introduces the next answer."""
        return self.tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=self.name, tokenize=False, add_generation_prompt=prompt
        )

    def render(self, chat: Chat) -> tuple[Chat, str]:
        """``chat``'s text, and ``chat`` as it was given to the template. Raises ``Unusable`` if that refuses it."""
        calls = [call for message in chat.messages for call in message.get("tool_calls", ())]
        arguments = [call["function"]["arguments"] for call in calls]
        error = None
        try:
            text = self(chat.messages, chat.tools)
        except Exception as raised:  # templates are programs: they raise what they like
            error = raised
        if arguments and (error or any(value and repr(value) in text for value in arguments)):
            # this template wants strings: it adds them to others, or prints objects as Python does
            chat = Chat([_with_strings(message) for message in chat.messages], chat.tools)
            try:
                return chat, self(chat.messages, chat.tools)
            except Exception as raised:
                error = error or raised
        if error:
            raise Unusable(f"the chat template refuses it ({(str(error) or repr(error)).splitlines()[0]})")
        return chat, text

    def answers(self, chat: Chat, text: str) -> tuple[Span, ...]:
        """The assistant's parts of ``text``, which ``render`` gave with ``chat``. Raises ``Unusable``."""
        if not any(message["role"] == "assistant" for message in chat.messages):
            raise Unusable("it has no message of an assistant")
        spans = self._marked(chat, text) or self._verbatim(chat, text) or self._by_difference(chat, text)
        if not spans:
            raise Unusable("the chat template leaves out every message of the assistant")
        return spans

    def _marked(self, chat: Chat, text: str) -> tuple[Span, ...]:
        """By the template's own marks, if it has any."""
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
        """If every content stands in ``text`` as it is, perhaps trimmed: one more rendering finds them all."""
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
        """A message is what changes in ``text`` when another one takes its place: it may be rewritten, not moved."""
        spans, last = [], 0
        for index, message in enumerate(chat.messages):
            answer = message["role"] == "assistant"
            found = self._changes(chat, text, index)
            if found is None and answer:
                found = self._between_prefixes(chat, text, index)
            if found is None:
                if answer:
                    raise Unusable(f"the chat template changes message {index + 1}, its place cannot be found")
                continue
            if found.start == found.end and not answer:
                continue
            if found.start < last:
                raise Unusable(f"the chat template changes more than message {index + 1} with it")
            # a turn whose tool calls the template leaves out would teach to answer with nothing
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
        """What stands between the messages before with the prompt for an answer, and those with the answer."""
        try:
            before = self(chat.messages[:index], chat.tools, prompt=True)
            behind = self(chat.messages[: index + 1], chat.tools).rstrip()
        except Exception:
            return None
        fits = text.startswith(behind) and behind.startswith(before)
        return Span(len(before), len(behind), True) if fits else None

    def _turn_start(self, text: str, low: int, start: int) -> int:
        """The model answers right behind the prompt for an answer: what a template adds in front is its to say."""
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
    """The first part of ``chat`` that does not stand in its rendered ``text``, blank space apart."""
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
    """Characters that both begin with, by bisection: slices are compared faster than characters."""
    low, high = 0, min(len(one), len(other))
    while low < high:
        middle = (low + high + 1) // 2
        if one[low:middle] == other[low:middle]:
            low = middle
        else:
            high = middle - 1
    return low
