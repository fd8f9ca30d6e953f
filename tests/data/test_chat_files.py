"""Files of conversations through prepare_data: what is trained on, what is skipped, dropped, counted and told."""

import json

import pytest
from helpers.text import (
    ASKED,
    CHATML,
    HELLO,
    MARKED,
    SHAREGPT,
    THINK,
    THOUGHTS,
    TOOLS,
    chat_of,
    make_tokenizer,
    read_rows,
    write,
)  # fmt: skip

from hylo_megatron.data import prepare
from hylo_megatron.data.documents import detect_format, read_texts
from hylo_megatron.errors import HyLoError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Tokenizer folders by the name of their template."""
    base = tmp_path_factory.mktemp("tokenizers")
    templates = {"chatml": CHATML, "tools": TOOLS, "think": THINK, "marked": MARKED, "none": None}
    templates |= {"two": {"rag": CHATML, "plain": CHATML}, "default": {"default": CHATML, "tool_use": TOOLS}}
    return {name: make_tokenizer(base / name, template) for name, template in templates.items()}


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
    rows = write(tmp_path / "rows.jsonl", {"text": "No chat."})
    with pytest.raises(HyLoError, match="--chat-template rag: no input has conversations; leave it out"):
        prepare.prepare([rows], folders["two"], out, template_name="rag")
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
