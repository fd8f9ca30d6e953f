"""Conversations of data sets, converted to the one form that chat templates expect."""

from typing import Any, NamedTuple

from hylo_megatron import json_file
from hylo_megatron.errors import HyLoError

KEYS = ("messages", "conversations", "conversation")
COLUMNS = (*KEYS, "tools", "functions", "system")
ROLES = {
    "human": "user", "gpt": "assistant", "chatgpt": "assistant", "bot": "assistant", "model": "assistant",
    "observation": "tool", "tool_response": "tool", "function_response": "tool",
}  # fmt: skip
REASONING = ("reasoning_content", "reasoning", "thinking")  # keys under which templates look for a message's reasoning
EXPECTED = '"messages" with "role" and "content", or "conversations" with "from" and "value"'


class Unusable(Exception):
    """Raised with the reason why a conversation cannot be trained on."""


class Chat(NamedTuple):
    """Messages and tools of a conversation in the OpenAI form, without null keys; tool arguments are objects."""

    messages: list[dict]
    tools: list[dict] | None


def holds_chats(row: Any, text_key: str) -> bool:
    if not isinstance(row, dict):
        return False
    return any(isinstance(row.get(key), list) for key in KEYS) or (
        any(key in row for key in KEYS) and text_key not in row
    )


def read_chat(row: Any) -> Chat:
    """Return the conversation in ``row``. Raises ``Unusable``."""
    key = next((key for key in KEYS if isinstance(row, dict) and row.get(key) is not None), None)
    if key is None:
        found = f"an object with {', '.join(map(repr, row)) or 'no keys'}" if isinstance(row, dict) else kind_of(row)
        raise Unusable(f"expected {EXPECTED}; found {found}")
    items = _parsed(row[key], key)
    if not isinstance(items, list) or not items:
        raise Unusable(f"'{key}' is {kind_of(items)}, expected a list of messages")
    messages = [_message(item, f"message {number}") for number, item in enumerate(items, 1)]
    if isinstance(row.get("system"), str) and row["system"] and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": row["system"]})
    return Chat(messages, _tools(row))


def kind_of(value: Any) -> str:
    """Return what a value of a row is, for a message."""
    if isinstance(value, bytes):
        return "bytes"
    names = {dict: "an object", list: "an empty list" if value == [] else "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def _name(text: str) -> str:
    return text if text.isidentifier() else repr(text)  # an error message is one line


def _parsed(value: Any, what: str) -> Any:
    """Parse ``value`` if it is a string: columns of one type store lists and objects as JSON strings."""
    if not isinstance(value, str):
        return value
    try:
        return json_file.parse(value, what)
    except HyLoError as error:
        raise Unusable(str(error)) from None


def _message(item: Any, what: str) -> dict:
    if not isinstance(item, dict):
        raise Unusable(f"{what} is {kind_of(item)}, expected an object with 'role' and 'content'")
    message = {key: value for key, value in item.items() if key not in ("from", "value") and value is not None}
    role = item.get("role", item.get("from"))
    if not isinstance(role, str):
        raise Unusable(f"{what} has no 'role' (or 'from'), its keys are {', '.join(map(repr, item)) or 'none'}")
    what = f"{what} ({_name(role)})"
    content = _content(item.get("content", item.get("value")), what)
    if role == "function_call":
        calls = _parsed(content, f"{what}: its content")
        message |= {"tool_calls": calls if isinstance(calls, list) else [calls]}
        role, content = "assistant", None
    if "function_call" in message:  # the form that preceded tool_calls
        message["tool_calls"] = [{"type": "function", "function": message.pop("function_call")}]
    message["role"] = ROLES.get(role, role)
    if "tool_calls" in message:
        message["tool_calls"] = [_tool_call(call, what) for call in _listed(message["tool_calls"], what)]
    message = {key: value for key, value in message.items() if key != "content" and value != []}
    if content is None and not set(message) & {"tool_calls", *REASONING}:
        raise Unusable(f"{what} has no content")
    return message if content is None else message | {"content": content}


def _content(content: Any, what: str) -> str | None:
    """Return the content as one string, its parts joined as vLLM joins them: serving sees what training saw."""
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise Unusable(f"{what}: its content is {kind_of(content)}, expected a string or parts of text")
    texts = []
    for part in content:
        kind = part.get("type", "text") if isinstance(part, dict) else "text"
        text = part.get("text") if isinstance(part, dict) else part
        if not isinstance(text, str) or not str(kind).endswith("text"):
            raise Unusable(f"{what} has a part of type {kind!r}, expected only text")
        texts.append(text)
    return "\n".join(texts)


def _listed(value: Any, what: str) -> list:
    value = _parsed(value, f"{what}: its tool calls")
    if not isinstance(value, list):
        raise Unusable(f"{what}: 'tool_calls' is {kind_of(value)}, expected a list")
    return value


def _tool_call(call: Any, what: str) -> dict:
    """Return the call with its arguments as an object, as templates expect; OpenAI's interface has strings."""
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise Unusable(f"{what} has a tool call without a function's name")
    of = f"{what}: the arguments of {_name(function['name'])}"
    arguments = _parsed(function.get("arguments") or {}, of)
    arguments = {} if arguments is None else arguments
    if not isinstance(arguments, dict):
        raise Unusable(f"{of} are {kind_of(arguments)}, expected an object")
    function = function | {"arguments": arguments}
    if "function" not in call:
        return {"type": "function", "function": function}
    kept = {key: value for key, value in call.items() if value is not None}
    return kept | {"type": kept.get("type", "function"), "function": function}


def _tools(row: dict) -> list[dict] | None:
    tools = _parsed(row.get("tools") or row.get("functions") or [], "'tools'")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Unusable(f"'tools' is {kind_of(tools)}, expected a list of objects")
    return tools or None
