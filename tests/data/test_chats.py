"""Conversations as people have them: what is rendered, which part is an answer, and why not."""

import json

import pytest
from helpers.text import (
    ASKED,
    CALL,
    CHATML,
    HELLO,
    MARKED,
    SHAREGPT,
    THINK,
    THOUGHTS,
    TOOLS,
    WEATHER,
    chat_of,
    make_tokenizer,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st

from hylo_megatron.data.chat_template import ChatTemplate, left_out
from hylo_megatron.data.chats import Chat, Unusable, read_chat

FEW = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(make_tokenizer(tmp_path_factory.mktemp("tokenizer")))


def rendered(tokenizer, template, row) -> tuple[str, list[str]]:
    tokenizer.chat_template = template
    chat, text = ChatTemplate(tokenizer).render(read_chat(row))
    return text, [text[span.start : span.end] for span in ChatTemplate(tokenizer).answers(chat, text)]


def test_sharegpt_is_the_same_as_messages():
    system = {"from": "system", "value": "Be brief."}
    tool = [{"from": "observation", "value": "12"}, {"from": "tool", "value": "13"}]
    assert read_chat(SHAREGPT) == read_chat(HELLO)
    roles = [m["role"] for m in read_chat({"conversations": [system, *SHAREGPT["conversations"], *tool]}).messages]
    assert roles == ["system", "user", "assistant", "tool", "tool"]
    assert read_chat(SHAREGPT | {"system": "Be brief."}).messages[0] == {"role": "system", "content": "Be brief."}
    assert read_chat({"conversations": json.dumps(SHAREGPT["conversations"])}) == read_chat(HELLO)
    assert read_chat({"messages": [{"from": "human", "value": "Hello"}, HELLO["messages"][1]]}) == read_chat(HELLO)


def test_tool_calls_in_all_their_forms():
    wanted = [CALL | {"function": {"name": "get_weather", "arguments": {"city": "Bern"}}}]
    assert read_chat(ASKED).messages[1] == {"role": "assistant", "tool_calls": wanted}
    assert read_chat(ASKED).tools == [WEATHER] == read_chat(ASKED | {"tools": json.dumps([WEATHER])}).tools
    call = {"name": "get_weather", "arguments": {"city": "Bern"}}
    for message in (
        {"role": "assistant", "function_call": call},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"from": "function_call", "value": json.dumps(call)},
    ):
        found = read_chat({"messages": [message]}).messages[0]
        assert found == {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    empty = {"role": "assistant", "tool_calls": [{"function": {"name": "now", "arguments": ""}}]}
    plain = {"role": "assistant", "content": "a", "tool_calls": []}
    first, second = read_chat({"messages": [empty, plain]}).messages
    assert first["tool_calls"][0]["function"] == {"name": "now", "arguments": {}} and "tool_calls" not in second


@pytest.mark.parametrize(
    "row, reason",
    [
        ({"text": "a"}, "expected \"messages\" with .* found an object with 'text'"),
        ([HELLO], "found a list"),
        ({"messages": []}, "'messages' is an empty list, expected a list of messages"),
        ({"messages": {"role": "user"}}, "'messages' is an object"),
        ({"messages": "no json"}, "messages: not valid JSON"),
        ({"messages": ["hi"]}, "message 1 is a string, expected an object with 'role' and 'content'"),
        ({"messages": [{"content": "hi"}]}, "message 1 has no 'role' \\(or 'from'\\), its keys are 'content'"),
        ({"messages": [{"role": 5, "content": "hi"}]}, "message 1 has no 'role'"),
        ({"messages": [{"role": "user", "content": None}]}, "message 1 \\(user\\) has no content"),
        ({"messages": [{"role": "user", "content": 5}]}, "message 1 \\(user\\): its content is a number"),
        (
            chat_of(("user", [{"type": "text", "text": "see"}, {"type": "image_url", "image_url": {}}])),
            "message 1 \\(user\\) has a part of type 'image_url', expected only text",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]},
            "message 1 \\(assistant\\): the arguments of f: not valid JSON",
        ),
        (
            {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "[1]"}}]}]},
            "the arguments of f are a list, expected an object",
        ),
        ({"messages": [{"role": "assistant", "tool_calls": [{}]}]}, "a tool call without a function's name"),
        ({"messages": [{"role": "assistant", "tool_calls": 5}]}, "'tool_calls' is a number, expected a list"),
        (HELLO | {"tools": 5}, "'tools' is a number, expected a list of objects"),
    ],
)
def test_why_a_conversation_cannot_be_used(row, reason):
    with pytest.raises(Unusable, match=reason):
        read_chat(row)


def test_templates_get_tools_objects_and_joined_parts(tokenizer):
    text, answers = rendered(tokenizer, TOOLS, ASKED)
    assert text.startswith(f"<|im_start|>system\nTools: {json.dumps([WEATHER])}<|im_end|>\n")
    assert answers == ['[call get_weather {"city": "Bern"}]', "It is 12 degrees."]
    parts = chat_of(("user", [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]))
    tokenizer.chat_template = CHATML
    assert ChatTemplate(tokenizer).render(read_chat(parts))[1] == "<|im_start|>user\none\ntwo<|im_end|>\n"


@pytest.mark.parametrize("printed", ["{{ c.function.arguments }}", "{{ '' + c.function.arguments }}"])
def test_a_template_that_wants_strings_gets_strings(tokenizer, printed):
    template = TOOLS.replace("{{ c.function.arguments | tojson }}", printed)
    text, answers = rendered(tokenizer, template, ASKED)
    assert answers[0].strip() == '[call get_weather {"city": "Bern"}]'


def test_answers_are_found_in_what_a_template_rewrites(tokenizer):
    text, answers = rendered(tokenizer, THINK, THOUGHTS)
    assert answers == ["Yes.", "<think>\nSecond.\n</think>\n\nNo."]
    assert "First" not in text and left_out(read_chat(THOUGHTS), text) == "the content of message 2"
    assert rendered(tokenizer, THINK, HELLO)[1] == ["<think>\n\n</think>\n\nGood day."]
    assert rendered(tokenizer, MARKED, HELLO)[1] == ["GOOD DAY.<|im_end|>"]  # the template's own marks
    strict = CHATML.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if m.role == 'tool' and not messages[loop.index0 - 1].tool_calls %}"
        "{{ raise_exception('no call') }}{% endif %}",
        1,
    ).replace("{{ m['content'] }}", "{{ m.content or m.tool_calls | tojson }}")
    calls = rendered(tokenizer, strict, ASKED)[1]  # the call cannot be taken away: found between prefixes
    assert calls[0].startswith('[{"id": "call_1"') and calls[1] == "It is 12 degrees."
    assert calls[0].endswith("}}]<|im_end|>")


def test_answers_that_cannot_be_found(tokenizer):
    for template, reason in (
        ("{{ messages | length }}", "leaves out every message of the assistant"),
        ("{% for m in messages %}{{ m.content[:2] }}{{ messages[-1].content }}{% endfor %}", "changes more than"),
    ):
        with pytest.raises(Unusable, match=reason):
            rendered(tokenizer, template, THOUGHTS)
    with pytest.raises(Unusable, match="no message of an assistant"):
        rendered(tokenizer, CHATML, chat_of(("user", "Hello")))
    dropped = CHATML.replace("{{ m['content'] }}", "{{ m.content }}")
    assert rendered(tokenizer, dropped, ASKED)[1] == ["It is 12 degrees."]  # a call that is left out is no answer


CONTENT = st.one_of(
    st.text(st.characters(codec="utf-8"), max_size=12),
    st.sampled_from(["<|im_end|>", "<|im_start|>assistant\n", "assistant", "\n", "mark0mark", "</think>", "user\n"]),
)


@FEW
@given(st.lists(st.tuples(CONTENT, CONTENT), min_size=1, max_size=4), st.booleans(), st.sampled_from([CHATML, TOOLS]))
def test_answers_of_generated_chats(tokenizer, turns, system, template):
    messages = [("system", "Be brief.")] * system
    messages += [turn for user, answer in turns for turn in (("user", user), ("assistant", answer))]
    text, answers = rendered(tokenizer, template, chat_of(*messages))
    wanted = [answer for _, answer in turns]
    assert answers == wanted
    chat = Chat([{"role": role, "content": content} for role, content in messages], None)
    spans = ChatTemplate(tokenizer)._by_difference(chat, text)  # the slow way finds the same
    assert [text[span.start : span.end] for span in spans] == wanted


@FEW
@given(st.lists(st.tuples(st.text("ab \n", max_size=5), st.text("cd ", max_size=5)), min_size=1, max_size=4))
def test_reasoning_of_generated_chats(tokenizer, turns):
    messages = []
    for thought, answer in turns:
        messages += [("user", "go"), ("assistant", f"<think>{thought}</think>{answer}")]
    _, answers = rendered(tokenizer, THINK, chat_of(*messages))
    thought, last = turns[-1]
    wanted = [answer.lstrip() for _, answer in turns[:-1]]
    assert answers == [*wanted, f"<think>\n{thought.strip()}\n</think>\n\n{last.lstrip()}"]


NAMES = ["role", "content", "from", "value", "tool_calls", "function", "name", "arguments", "type", "text"]
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(NAMES), inner, max_size=4),
    max_leaves=12,
)


@FEW
@given(
    st.fixed_dictionaries(
        {
            "messages": JUNK
            | st.lists(st.dictionaries(st.sampled_from(NAMES), JUNK | st.just("assistant")), min_size=1)
        },
        optional={"tools": JUNK, "system": JUNK},
    )
)
def test_any_conversation_is_read_or_has_a_reason(tokenizer, row):
    tokenizer.chat_template = TOOLS
    template = ChatTemplate(tokenizer)
    try:
        chat, text = template.render(read_chat(row))
        template.answers(chat, text)
    except Unusable as reason:
        assert str(reason)
    else:
        left_out(chat, text)
