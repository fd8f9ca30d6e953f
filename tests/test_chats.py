"""Conversations as people have them: what is rendered, which part is an answer, what is skipped and counted."""

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from text_helpers import CHATML, MARKED, THINK, TOOLS, make_tokenizer, read_rows

from hylo_megatron.data import prepare
from hylo_megatron.data.chat_template import ChatTemplate, left_out
from hylo_megatron.data.chats import Chat, Unusable, read_chat
from hylo_megatron.data.documents import detect_format, read_texts
from hylo_megatron.errors import HyLoError

FEW = settings(max_examples=25, deadline=None, derandomize=True)
WEATHER = {"type": "function", "function": {"name": "get_weather", "parameters": {"type": "object"}}}
CALL = {"id": "call_1", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Bern"}'}}
HELLO = {"messages": [{"role": "user", "content": "Hello"}, {"role": "assistant", "content": "Good day."}]}
ASKED = {
    "messages": [
        {"role": "user", "content": "Weather in Bern?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "call_1", "content": "12 degrees"},
        {"role": "assistant", "content": "It is 12 degrees."},
    ],
    "tools": [WEATHER],
}
SHAREGPT = {"conversations": [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Good day."}]}
THOUGHTS = {
    "messages": [
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": "<think>\nFirst.\n</think>\n\nYes."},
        {"role": "user", "content": "More."},
        {"role": "assistant", "content": "<think>\nSecond.\n</think>\n\nNo."},
    ]
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizer folders by the name of their template."""
    base = tmp_path_factory.mktemp("tokenizers")
    templates = {"chatml": CHATML, "tools": TOOLS, "think": THINK, "marked": MARKED, "none": None}
    templates |= {"two": {"rag": CHATML, "plain": CHATML}, "default": {"default": CHATML, "tool_use": TOOLS}}
    return {name: make_tokenizer(base / name, template) for name, template in templates.items()}


@pytest.fixture(scope="module")
def tokenizer(folders):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folders["chatml"])


def write(path, *values):
    path.write_text("".join(json.dumps(value) + "\n" for value in values))
    return path


def rendered(tokenizer, template, row) -> tuple[str, list[str]]:
    tokenizer.chat_template = template
    chat, text = ChatTemplate(tokenizer).render(read_chat(row))
    return text, [text[span.start : span.end] for span in ChatTemplate(tokenizer).answers(chat, text)]


def chat_of(*turns) -> dict:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


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


def test_a_few_bad_conversations_are_skipped_counted_and_shown(folders, tmp_path, capsys):
    bad = [chat_of(("user", None)), chat_of(("robot", "hi")), {"id": 5}, chat_of(("user", 7))]
    path = write(tmp_path / "a.jsonl", *[HELLO] * 5, *bad)
    prepare.main(["--input", str(path), "--tokenizer", str(folders["chatml"]), "--out", str(tmp_path / "out")])
    out, err = capsys.readouterr()
    assert "5 documents" in out and "4 conversations skipped" in out
    assert "4 of 9 conversations cannot be used and were skipped:" in err and err.count("a.jsonl:") == 3
    assert f"{path}:7: the chat template refuses it (unknown role robot)" in err
    assert json.loads((tmp_path / "out.json").read_text())["skipped_conversations"] == 4
    write(path, HELLO, *bad)
    for tool in (
        lambda: prepare.prepare([path], folders["chatml"], tmp_path / "new"),
        lambda: list(read_texts(path, template_of(folders["chatml"]))),
    ):
        with pytest.raises(HyLoError, match=r"a.jsonl:2: message 1 .*; more than half .* cannot be used \(4 of 5\)"):
            tool()
    assert not list(tmp_path.glob("new*"))


def template_of(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def test_a_template_that_drops_reasoning_says_so_once(folders, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", HELLO, *[THOUGHTS] * 5)
    summary = prepare.prepare([path], folders["think"], tmp_path / "out")
    err = capsys.readouterr().err
    assert summary["changed_conversations"] == 5 and err.count("\n") == 1
    assert f"a part of 5 of 6 conversations, that part is not in the text: first in {path}:2 (the content of" in err
    assert list(read_texts(path, template_of(folders["think"])))[1].count("<think>") == 1


@pytest.mark.parametrize("name, wanted", [("think", "<think>\nSecond.\n</think>\n\nNo.<|im_end|>"), ("marked", None)])
def test_answers_only_learns_what_was_rendered(folders, tmp_path, name, wanted):
    from tokenizers import Tokenizer

    path = write(tmp_path / "a.jsonl", *[THOUGHTS] * 3)
    prepare.prepare([path], folders[name], tmp_path / "out", pack_length=64, answers_only=True)
    tokens = [token for row in read_rows(tmp_path / "out") for token in row]
    mask = (tmp_path / "out.learnt.bin").read_bytes()
    decoder = Tokenizer.from_file(str(folders[name] / "tokenizer.json"))
    learnt = decoder.decode([t for t, here in zip(tokens, mask, strict=True) if here], skip_special_tokens=False)
    once = f"Yes.<|im_end|>{wanted}" if wanted else "".join(
        message["content"].upper() + "<|im_end|>" for message in THOUGHTS["messages"][1::2]
    )  # fmt: skip
    assert learnt.startswith(once) and (once * 3).startswith(learnt)


def test_sequences_that_teach_nothing_are_dropped_and_counted(folders, tmp_path, capsys):
    path = write(tmp_path / "a.jsonl", *[chat_of(("user", "z" * 500), ("assistant", "yes"))] * 4)
    arguments = ["--input", str(path), "--tokenizer", str(folders["chatml"]), "--answers-only"]
    prepare.main([*arguments, "--pack-length", "33", "--out", str(tmp_path / "out")])
    summary, mask = json.loads((tmp_path / "out.json").read_text()), (tmp_path / "out.learnt.bin").read_bytes()
    rows = read_rows(tmp_path / "out")
    assert len(mask) == 33 * len(rows) == summary["tokens"] and 3 <= len(rows) <= 8
    assert all(any(mask[at + 1 : at + 33]) for at in range(0, len(mask), 33))
    dropped = summary["sequences_without_answers"]
    assert f"{dropped} sequences without a token of an answer dropped" in capsys.readouterr().out
    prepare.prepare([path], folders["chatml"], tmp_path / "all", pack_length=33)
    assert dropped + len(rows) == len(read_rows(tmp_path / "all"))
    write(path, chat_of(("user", "z" * 500), ("assistant", "yes")))
    with pytest.raises(HyLoError, match="none of the 1 sequences of --pack-length 400 holds a token of an answer"):
        prepare.prepare([path], folders["chatml"], tmp_path / "new", pack_length=400, answers_only=True)
    assert not list(tmp_path.glob("new*"))


def test_several_templates(folders, tmp_path):
    path = write(tmp_path / "a.jsonl", HELLO)
    out = tmp_path / "out"
    with pytest.raises(HyLoError, match="chat templates plain, rag and none is the default: .*--chat-template"):
        prepare.prepare([path], folders["two"], out)
    with pytest.raises(HyLoError, match="chat templates plain, rag and none is the default"):
        list(read_texts(path, template_of(folders["two"])))
    with pytest.raises(HyLoError, match="no chat template 'other', its templates are plain, rag"):
        prepare.prepare([path], folders["two"], out, template_name="other")
    with pytest.raises(HyLoError, match="no chat template 'other', it has one template, without a name"):
        prepare.prepare([path], folders["chatml"], out, template_name="other")
    with pytest.raises(HyLoError, match="none: has no chat template, which .*a.jsonl needs"):
        prepare.prepare([path], folders["none"], out)
    assert prepare.prepare([path], folders["two"], out, template_name="rag")["documents"] == 1
    write(path, ASKED)  # with tools, transformers takes the template for tools
    assert "Tools:" in next(read_texts(path, template_of(folders["default"])))


def test_what_rows_hold_is_seen_from_them(tmp_path):
    import pyarrow
    import pyarrow.parquet

    for value, expected in (
        (HELLO, "chat"),
        (SHAREGPT, "chat"),
        (HELLO | {"text": "also"}, "chat"),
        ({"text": "a", "messages": None}, "jsonl"),
        ({"text": "a", "conversation": "number 5"}, "jsonl"),
        ({"messages": None}, "chat"),
    ):
        assert detect_format(write(tmp_path / "a.jsonl", value)) == expected
    assert detect_format(write(tmp_path / "a.jsonl", HELLO | {"body": "also"}), text_key="body") == "jsonl"
    (tmp_path / "a.json").write_text(json.dumps([HELLO], indent=1))
    assert detect_format(tmp_path / "a.json") == "chat"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([HELLO, ASKED]), tmp_path / "a.parquet")
    assert detect_format(tmp_path / "a.parquet") == "chat"


def test_parquet_chats_are_those_of_json_lines(folders, tmp_path):
    """Arrow gives each message the keys of all others, with nulls."""
    import pyarrow
    import pyarrow.parquet

    calls = [{"function": {"name": "f", "arguments": arguments}} for arguments in ({"city": "Bern"}, {"zone": 1})]
    objects = {"messages": [{"role": "assistant", "tool_calls": calls}]}
    rows = [objects, HELLO, SHAREGPT | HELLO]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    tokenizer = template_of(folders["tools"])
    lines = list(read_texts(write(tmp_path / "a.jsonl", *rows), tokenizer))
    assert len(lines) == 3 and list(read_texts(tmp_path / "a.parquet", tokenizer)) == lines
