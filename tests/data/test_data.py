"""Text to .bin/.idx, with tiny tokenizers trained on the spot and read back with Megatron's own reader."""

import json

import pytest
from helpers.token_files import TEXTS, read_back

from hylo_megatron.data import documents, prepare
from hylo_megatron.data.tokenizers import load_tokenizer
from hylo_megatron.errors import HyLoError


def decode(folder, ids: list[int]) -> str:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json")).decode(ids, skip_special_tokens=False)


def test_documents_come_back_whole_with_eod(tokenizer_folder, jsonl, tmp_path):
    summary = prepare.prepare([jsonl], tokenizer_folder, tmp_path / "out")
    rows = read_back(tmp_path / "out")
    assert [decode(tokenizer_folder, row) for row in rows] == [text + "<|endoftext|>" for text in TEXTS]
    assert summary == json.loads((tmp_path / "out.json").read_text())
    assert summary["tokens"] == sum(map(len, rows)) and summary["dtype"] == "uint16"
    assert (summary["documents"], summary["empty_documents"], summary["eod_id"]) == (3, 1, 0)
    assert summary["vocab_size"] == 300
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.jsonl", "out.bin", "out.idx", "out.json"]


def test_without_eod_and_with_another_key(tokenizer_folder, tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text('{"body": "ships and sails", "text": "no"}\n')
    prepare.prepare([path], tokenizer_folder, tmp_path / "out", text_key="body", append_eod=False)
    assert [decode(tokenizer_folder, row) for row in read_back(tmp_path / "out")] == ["ships and sails"]


@pytest.mark.parametrize("batch", [1, prepare.BATCH_CHARACTERS])
def test_packing_joins_and_cuts_exactly(tokenizer_folder, jsonl, tmp_path, monkeypatch, batch):
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", batch)
    prepare.prepare([jsonl, jsonl], tokenizer_folder, tmp_path / "whole")
    stream = [token for row in read_back(tmp_path / "whole") for token in row]
    summary = prepare.prepare([jsonl, jsonl], tokenizer_folder, tmp_path / "packed", pack_length=16, append_eod=False)
    rows = read_back(tmp_path / "packed")
    assert {len(row) for row in rows} == {16}
    assert [token for row in rows for token in row] == stream[: len(rows) * 16]
    assert summary["dropped_tokens"] == len(stream) - len(rows) * 16 < 16
    assert summary["sequences"] == len(rows) and summary["documents"] == 6


@pytest.mark.parametrize("pack_length", [None, 8])
def test_a_text_file_is_one_document_however_it_is_read(tokenizer_folder, tmp_path, monkeypatch, pack_length):
    path = tmp_path / "book.txt"
    content = "First line.\nsecond one\n\n\n    indented\n\n\tmore\nlast   \n\nend." * 5
    path.write_text(content)
    prepare.prepare([path], tokenizer_folder, tmp_path / "whole", pack_length=pack_length)
    monkeypatch.setattr(documents, "BLOCK", 1)
    pieces = list(documents.read_documents(path, "text", "text", None))
    assert len(pieces) > 10 and "".join(piece.text for piece in pieces) == content
    assert [piece.last for piece in pieces] == [False] * (len(pieces) - 1) + [True]
    monkeypatch.setattr(prepare, "BATCH_CHARACTERS", 20)
    summary = prepare.prepare([path], tokenizer_folder, tmp_path / "blocks", pack_length=pack_length)
    assert summary["documents"] == 1
    assert read_back(tmp_path / "blocks") == read_back(tmp_path / "whole")
    assert (tmp_path / "blocks.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_chat_is_rendered_by_the_template(tokenizer_folder, tmp_path):
    path = tmp_path / "chat.jsonl"
    messages = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]
    path.write_text(json.dumps({"messages": messages}))
    prepare.prepare([path], tokenizer_folder, tmp_path / "out")
    (row,) = read_back(tmp_path / "out")
    assert decode(tokenizer_folder, row) == (
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nyo<|im_end|>\n<|endoftext|>"
    )
    assert row[0] == 1 and row.count(2) == 2  # markers are single tokens


def write_chats(path, *chats):
    roles = ("user", "assistant")
    lines = [{"messages": [{"role": roles[i % 2], "content": c} for i, c in enumerate(chat)]} for chat in chats]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def test_answers_only_masks_everything_but_answers(tokenizer_folder, tmp_path):
    chats = [("hi", "yo", "assistant", "user hi"), ("mark0mark", "ünï yo")]  # contents that look like the template
    path = write_chats(tmp_path / "chat.jsonl", *chats, ("z" * 24, "y"))  # the last sequence is not full
    prepare.prepare([path], tokenizer_folder, tmp_path / "out", pack_length=24, answers_only=True)
    tokens = [token for row in read_back(tmp_path / "out") for token in row]
    mask = (tmp_path / "out.learnt.bin").read_bytes()
    assert len(mask) == len(tokens)
    learnt = decode(tokenizer_folder, [token for token, here in zip(tokens, mask, strict=True) if here])
    whole = "yo<|im_end|>user hi<|im_end|>ünï yo<|im_end|>"
    assert learnt.removesuffix("y<|im_end|>") == whole
    prepare.prepare([path], tokenizer_folder, tmp_path / "out", pack_length=5)
    assert not (tmp_path / "out.learnt.bin").exists()


def test_answers_only_says_what_it_needs(tokenizer_folder, tmp_path):
    chat = write_chats(tmp_path / "chat.jsonl", ("hi", "yo"))
    text = tmp_path / "in.txt"
    text.write_text("hi")
    for inputs, length, word in (([chat, text], 5, "needs chats"), ([chat], None, "--pack-length")):
        with pytest.raises(HyLoError, match=word):
            prepare.prepare(inputs, tokenizer_folder, tmp_path / "out", pack_length=length, answers_only=True)


def test_sentencepiece_model(tmp_path):
    import sentencepiece

    corpus = tmp_path / "corpus.txt"
    corpus.write_text("\n".join(["the quick brown fox jumps over the lazy dog", "seven tall ships sail past"] * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(corpus), model_prefix=str(tmp_path / "spm"), vocab_size=60, hard_vocab_limit=False, minloglevel=2
    )
    path = tmp_path / "in.jsonl"
    path.write_text('{"text": "seven lazy ships"}\n{"text": "the dog"}\n')
    model = tmp_path / "spm.model"
    summary = prepare.prepare([path], model, tmp_path / "out", workers=2)
    processor = sentencepiece.SentencePieceProcessor(model_file=str(model))
    assert read_back(tmp_path / "out") == [
        [*processor.encode(text), processor.eos_id()] for text in ("seven lazy ships", "the dog")
    ]
    assert summary["vocab_size"] == processor.vocab_size()
    with pytest.raises(HyLoError, match="<nope>.*--eod-token"):
        load_tokenizer(model, 1, "<nope>")


@pytest.mark.parametrize(
    "content, options, message",
    [
        ('{"text": "a"}\n{"text": \n', {}, r"in.jsonl:2: not valid JSON"),
        ('{"text": "a"}\n\n[1]\n', {}, r"in.jsonl:3: a JSON list, expected an object"),
        ('{"body": "a"}\n', {}, r"in.jsonl:1: expected a string under 'text', the keys are 'body'.*--text-key"),
        ('{"text": 5}\n', {}, r"in.jsonl:1: expected a string"),
        ("\nplain\n", {}, r"in.jsonl:2: not a JSON object"),
        (b'{"text": "a"}\n{"text": "\xff"}\n', {}, r"in.jsonl:2: byte 0xff is not UTF-8.*iconv"),
        ('{"messages": [{"role": "user"}]}\n', {}, r"in.jsonl:1: message 1 \(user\) has no content"),
        ('{"messages": [{"role": "tool", "content": "x"}]}\n', {}, r"in.jsonl:1: .*refuses it.*unknown role tool"),
        ('{"text": "a"}\n', {"pack_length": 100}, "2 tokens, too few for one sequence of --pack-length 100"),
        ('{"text": "a"}\n', {"pack_length": 1}, "expected at least 2"),
        ('{"text": "a"}\n', {"eod_token": "<nope>"}, "<nope>.*--eod-token"),
        ('{"text": ""}\n', {}, "no text found"),
        ("", {}, "the file is empty"),
    ],
)
def test_bad_input_is_named_and_nothing_is_left(tokenizer_folder, tmp_path, content, options, message):
    path = tmp_path / "in.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(HyLoError, match=message) as caught:
        prepare.prepare([path], tokenizer_folder, tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert [item.name for item in tmp_path.iterdir()] == ["in.jsonl"]


def test_a_failed_run_keeps_the_earlier_result(tokenizer_folder, jsonl, tmp_path):
    prepare.prepare([jsonl], tokenizer_folder, tmp_path / "out")
    before = (tmp_path / "out.bin").read_bytes()
    jsonl.write_text('{"text": "new"}\n{')
    with pytest.raises(HyLoError):
        prepare.prepare([jsonl], tokenizer_folder, tmp_path / "out")
    assert (tmp_path / "out.bin").read_bytes() == before and len(read_back(tmp_path / "out")) == 3


def test_format_is_seen_from_the_file(tmp_path):
    for name, content, expected in (
        ("a.jsonl", '\n{"text": "x"}', "jsonl"),
        ("b.dat", '{"messages": []}', "chat"),
        ("c.txt", '{"text": "x"}', "jsonl"),
        ("c.md", '{"x": 1} words', "text"),
        ("d", "words", "text"),
    ):
        (tmp_path / name).write_text(content)
        assert documents.detect_format(tmp_path / name) == expected


def test_missing_pieces_are_named_on_the_command_line(tokenizer_folder, jsonl, tmp_path, capsys):
    plain = tmp_path / "plain"
    plain.mkdir()
    (plain / "tokenizer.json").write_bytes((tokenizer_folder / "tokenizer.json").read_bytes())
    chat = tmp_path / "chat.jsonl"
    chat.write_text('{"messages": []}\n')
    for arguments, message in (
        (["--input", "gone.txt", "--tokenizer", str(tokenizer_folder)], "gone.txt: no such file"),
        (["--input", str(jsonl), "--tokenizer", str(tmp_path)], "expected a folder with tokenizer.json"),
        (["--input", str(jsonl), "--tokenizer", str(tokenizer_folder), "--workers", "0"], "expected 1 or more"),
        (["--input", str(chat), "--tokenizer", str(plain), "--eod-token", "<|im_end|>"], "has no chat template"),
    ):
        with pytest.raises(SystemExit) as caught:
            prepare.main([*arguments, "--out", str(tmp_path / "out")])
        assert caught.value.code == 2
        assert message in capsys.readouterr().err
    prepare.main(
        [
            "--input",
            str(jsonl),
            "--tokenizer",
            str(tokenizer_folder),
            "--out",
            str(tmp_path / "new" / "out"),
            "--pack-length",
            "16",
            "--workers",
            "1",
        ]
    )
    assert "sequences of 16" in capsys.readouterr().out
