"""The same file through prepare_data, calibration and evaluation: the same documents, or the same refusal."""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import re
import tarfile

import pytest
from helpers.text import make_tokenizer, read_rows
from hypothesis import given, settings
from hypothesis import strategies as st

from hylo_megatron.data import prepare, rows, text_files
from hylo_megatron.data.documents import check_texts, read_texts
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.perplexity import encode_documents
from hylo_megatron.init.calibration import calibration_tokens

END = "<|endoftext|>"
TEXTS = ['The first.\n\nTwo paragraphs, and a "quote".', "", "Ünïcode — 你好 🙂;\ttab", "  \n", "last, one\\n " * 9]
FEW = settings(max_examples=25, deadline=None, derandomize=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module")
def tokenizer(folder):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder)


def packed_zstd(data: bytes) -> bytes:
    import zstandard

    half = len(data) // 2  # two frames, as tools that append write them
    return zstandard.compress(data[:half]) + zstandard.compress(data[half:])


def packed_tar(name: str, data: bytes) -> bytes:
    out, entry = io.BytesIO(), tarfile.TarInfo(name)
    entry.size = len(data)
    with tarfile.open(fileobj=out, mode="w") as archive:
        archive.addfile(entry, io.BytesIO(data))
    return out.getvalue()


PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress, ".zst": packed_zstd}


def jsonl(texts, end="\n") -> str:
    return end.join(f"{json.dumps({'id': n, 'text': t}, ensure_ascii=n % 2)}{end}" for n, t in enumerate(texts))


def table(texts, delimiter=",") -> str:
    out = io.StringIO()
    csv.writer(out, delimiter=delimiter).writerows([["id", "text"], *enumerate(texts)])
    return out.getvalue()


WRITERS = {
    "lines.jsonl": jsonl,
    "windows.ndjson": lambda texts: jsonl(texts, "\r\n"),
    "lines-in.json": jsonl,
    "array.json": lambda texts: json.dumps([{"text": text, "more": {"a": [1, "]"]}} for text in texts]),
    "pretty.json": lambda texts: json.dumps([{"text": text} for text in texts], indent=2, ensure_ascii=False) + "\n",
    "one-after-another.json": lambda texts: "\n".join(json.dumps({"text": text}, indent=1) for text in texts),
    "comma.csv": table,
    "semicolon.csv": lambda texts: table(texts, ";"),
    "tab.tsv": lambda texts: table(texts, "\t"),
}


def write_parquet(path, columns):
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=2)
    return path


def by_prepare(path, folder) -> list[str]:
    from tokenizers import Tokenizer

    out = path.with_name("out")
    prepare.prepare([path], folder, out)
    decoder = Tokenizer.from_file(str(folder / "tokenizer.json"))
    return [decoder.decode(ids, skip_special_tokens=False).removesuffix(END) for ids in read_rows(out)]


def in_every_tool(path, folder, tokenizer) -> list[str] | str:
    """The documents, or the refusal; the same in the three tools."""
    outcomes = []
    for tool in (
        lambda: by_prepare(path, folder),
        lambda: check_texts(path) or [tokenizer.decode(x) for x in encode_documents(tokenizer, path, 10**6, 10**6)],
        lambda: tokenizer.decode(calibration_tokens(path, folder, 8, 4).flatten()),
    ):
        try:
            outcomes.append(tool())
        except HyLoError as error:
            outcomes.append(f"refused: {error}")
    prepared, evaluated, calibrated = outcomes
    if isinstance(prepared, str):
        assert prepared == evaluated == calibrated and "\n" not in prepared
        return prepared
    assert evaluated == [text for text in prepared if text.strip()]
    starts = calibrated.split(END)
    assert all(any(text.startswith(start.rstrip("�")) for text in prepared) for start in starts[:-1])
    return prepared


@pytest.mark.parametrize("suffix", PACKERS)
@pytest.mark.parametrize("name", WRITERS)
def test_every_format_in_every_tool(folder, tokenizer, tmp_path, name, suffix):
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(PACKERS[suffix](WRITERS[name](TEXTS).encode()))
    assert in_every_tool(path, folder, tokenizer) == [text for text in TEXTS if text]
    assert json.loads((tmp_path / "out.json").read_text())["empty_documents"] == 1


def test_parquet(folder, tokenizer, tmp_path):
    texts = [TEXTS[0], None, *TEXTS[2:]]
    path = write_parquet(tmp_path / "a.parquet", {"text": texts, "id": list(range(len(texts)))})
    assert in_every_tool(path, folder, tokenizer) == [text for text in TEXTS if text]
    other = write_parquet(tmp_path / "b.parquet", {"body": ["a"], "id": [1]})
    refused = in_every_tool(other, folder, tokenizer)
    assert "b.parquet: row 1: expected a string under 'text', the keys are 'body', 'id'" in refused
    assert "--text-key" in refused
    prepare.prepare([other], folder, tmp_path / "out", text_key="body")
    other.write_bytes(other.read_bytes()[:-20])
    assert "cannot be read" in in_every_tool(other, folder, tokenizer)


@FEW
@given(
    texts=st.lists(st.text(st.characters(codec="utf-8", exclude_characters="\0")), min_size=1, max_size=5),
    name=st.sampled_from(sorted(WRITERS)),
    suffix=st.sampled_from(sorted(PACKERS)),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    block=st.sampled_from([1, 7, 1 << 20]),
)
def test_generated_files(tmp_path_factory, texts, name, suffix, encoding, block):
    path = tmp_path_factory.mktemp("files") / f"{name}{suffix}"
    content = WRITERS[name](texts)
    path.write_bytes(PACKERS[suffix](content.encode(encoding)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(text_files, "BLOCK", max(8, block))
        patch.setattr(rows, "LONG_LINE", max(8, block))
        assert list(read_texts(path)) == [text for text in texts if text.strip()]


@FEW
@given(
    name=st.sampled_from(sorted(WRITERS)),
    suffix=st.sampled_from(sorted(PACKERS)),
    place=st.floats(0, 1, exclude_max=True),
    change=st.sampled_from(["cut", "flip", "double", "\0", "\n", '"']),
)
def test_damaged_files_are_named_in_one_line(tmp_path_factory, name, suffix, place, change):
    path = tmp_path_factory.mktemp("files") / f"{name}{suffix}"
    data = bytearray(PACKERS[suffix](WRITERS[name](TEXTS * 3).encode()))
    at = int(place * len(data))
    data[at:] = {"cut": b"", "flip": bytes([data[at] ^ 255]) + data[at + 1 :], "double": data[at:] * 2}.get(
        change, change.encode() + data[at:]
    )
    path.write_bytes(data)
    try:
        documents = list(read_texts(path))
    except HyLoError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    else:
        assert all(isinstance(text, str) for text in documents)


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("a.jsonl", b'{"text": "a"}\n{"text": "caf\xe9"}\n', r"a.jsonl:2: byte 0xe9 is not UTF-8.*iconv -f latin1"),
        ("a.txt", b"one\ntwo\n\ncaf\xe9\n", r"a.txt:4: byte 0xe9 is not UTF-8.*iconv -f latin1"),
        ("a.csv", b"text\nb\ncaf\xe9\n", r"a.csv:3: byte 0xe9 is not UTF-8"),
        ("a.txt", "one\ntwo".encode("utf-16-le"), r"a.txt:1: a NUL byte: .*UTF-16 without a byte-order mark"),
        ("a.txt", b"\xff\xfeo\x00n", r"a.txt:1: not utf-16-le, which the file's byte-order mark names"),
        ("a.jsonl", b'{"text": "a"}\n{"text": "b", "score": NaN}\n', r"a.jsonl:2: not valid JSON .*NaN.*null"),
        ("a.json", b'[{"text": "a"},\n{"text": "b", "score": Infinity}]', r"a.json:2: not valid JSON .*Infinity"),
        ("a.json", b'[{"text": "a"},\n{"text": "b"\n', r"a.json:[23]: not valid JSON"),
        ("a.json", b'[{"text": "a"}\n', r"a.json:2: not valid JSON: expected a comma or the end of the array"),
        ("a.json", b'[{"text": "a"},\n', r"a.json:2: not valid JSON: the array has no end"),
        ("a.json", b'[{"text": "a"}]\n[]', r"a.json:2: not valid JSON: text behind the array"),
        ("a.json", b'[{"text": "a"}, 7]', r"a.json:1: a JSON int, expected an object"),
        ("a.json", b"[" * 100_000, r"a.json:1: not valid JSON \(nested too deeply\)"),
        ("a.jsonl", b'{"text": ' + b"[" * 100_000, r"a.jsonl:1: not valid JSON"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ["b"]}\n', r"a.jsonl:2: expected a string under 'text'"),
        ("a.csv", b'id,text\n1,a\n2,"b\n', r"a.csv:3: not valid csv"),
        ("a.csv", b"id,text\n1,a\n2\n", r"a.csv:3: 1 columns, expected 2"),
        ("a.csv", b"id,body\n1,a\n", r"a.csv:2: expected a string under 'text', the keys are 'id', 'body'"),
        ("a.parquet", b'{"text": "a"}\n', r"a.parquet: not a parquet file"),
        ("a.parquet", b"PAR1 and no more", r"a.parquet: row 1 cannot be read"),
        ("a.parquet.gz", gzip.compress(b"PAR1"), r"a.parquet.gz: a compressed parquet file: unpack it first"),
        ("a.jsonl", b"PK\x03\x04and so on", r"a.jsonl: a zip archive"),
        (
            "a.jsonl.gz",
            gzip.compress(gzip.compress(b'{"text": "a"}')),
            r"gz: compressed twice .inside is gzip",
        ),
        ("a.tar.gz", gzip.compress(packed_tar("a.txt", b"one")), r"a.tar.gz: a tar archive, .* name the files in it"),
        ("a.txt", b"%PDF-1.7 and so on", r"a.txt: a PDF file, expected text"),
        ("a.jsonl", b'{"text": 5}', r"a.jsonl:1: expected a string under 'text', found a number: .*--text-key"),
        ("a.jsonl", b'{"text": ["a"]}', r"a.jsonl:1: expected a string under 'text', found a list"),
        ("a.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 99)[:-9], r"a.jsonl.gz:\d+: the rest cannot be read"),
        ("a.jsonl.xz", lzma.compress(b'{"text": "a"}\n' * 99)[:-9], r"a.jsonl.xz:\d+: the rest cannot be read"),
        ("a.jsonl.zst", packed_zstd(b'{"text": "a"}\n' * 99)[:-9], r"a.jsonl.zst:\d+: the rest cannot be read"),
        ("a.jsonl", b"", r"a.jsonl: the file is empty"),
        ("a.csv", b"\n\n", r"a.csv: the file is empty"),
        ("a.txt", b" \n\t\n", r"a.txt: the file is empty"),
        ("a.gz", gzip.compress(b""), r"a.gz: the file is empty"),
        ("a.jsonl", None, r"a.jsonl: a folder, expected a file of text"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",  # what gzip makes has the time in it
)
def test_refusals_are_the_same_in_every_tool(folder, tokenizer, tmp_path, name, content, message):
    path = tmp_path / name
    path.mkdir() if content is None else path.write_bytes(content)
    refused = in_every_tool(path, folder, tokenizer)
    assert isinstance(refused, str) and re.search(message, refused), refused
    assert [item.name for item in tmp_path.iterdir()] == [name]


def test_a_file_that_is_missing_or_a_pipe(folder, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for name, message in (("gone.jsonl", "no such file"), ("pipe", "not a regular file")):
        with pytest.raises(HyLoError, match=message):
            list(read_texts(tmp_path / name))


def test_the_contents_decide_where_the_name_is_wrong(folder, tokenizer, tmp_path):
    for name, data in (
        ("a.jsonl", gzip.compress(jsonl(TEXTS).encode())),
        ("b.jsonl.gz", jsonl(TEXTS).encode()),
        ("c.gz", packed_zstd(jsonl(TEXTS).encode())),
        ("d", WRITERS["pretty.json"](TEXTS).encode()),
        ("e.txt", jsonl(TEXTS).encode()),
        ("f.md.gz", gzip.compress(WRITERS["array.json"](TEXTS).encode())),
    ):
        (tmp_path / name).write_bytes(data)
        assert in_every_tool(tmp_path / name, folder, tokenizer) == [text for text in TEXTS if text]


def test_plain_text_is_one_document_with_line_feeds(folder, tokenizer, tmp_path):
    for name, data in (
        ("a.txt", b"one\r\n\r\ntwo\r\n"),
        ("b.md", "\ufeffone\n\ntwo\n".encode()),
        ("c", "one\n\ntwo\n".encode("utf-16")),
        ("d.txt.xz", lzma.compress(b"one\n\ntwo\n")),
    ):
        (tmp_path / name).write_bytes(data)
        assert in_every_tool(tmp_path / name, folder, tokenizer) == ["one\n\ntwo\n"]
    (tmp_path / "e").write_text("{\\bf bold}\n[1] a note\n")  # looks like JSON, and is not
    assert in_every_tool(tmp_path / "e", folder, tokenizer) == ["{\\bf bold}\n[1] a note\n"]
    (tmp_path / "f.txt").write_text('{"time": 3}\n[{"text": 4}]\n')  # a log in JSON: no rows of text
    assert in_every_tool(tmp_path / "f.txt", folder, tokenizer) == ['{"time": 3}\n[{"text": 4}]\n']
    (tmp_path / "g.txt").write_text('{"text": "a"}\n')
    prepare.prepare([tmp_path / "g.txt"], folder, tmp_path / "out", form="text")
    assert [tokenizer.decode(ids) for ids in read_rows(tmp_path / "out")] == ['{"text": "a"}\n' + END]


def test_lone_surrogates_are_replaced_and_counted(folder, tokenizer, tmp_path, capsys):
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "cut \\ud83d"}\n{"text": "whole \\ud83d\\ude42"}\n{"text": "\\ude42\\ud83d"}\n')
    assert in_every_tool(path, folder, tokenizer) == ["cut \ufffd", "whole 🙂", "\ufffd\ufffd"]
    assert json.loads((tmp_path / "out.json").read_text())["documents_with_lone_surrogates"] == 2
    assert "in 2 documents were replaced by U+FFFD: first in" in capsys.readouterr().err


def test_a_long_array_is_never_held_whole(tmp_path):
    import tracemalloc

    path = tmp_path / "a.json.gz"
    row = json.dumps({"text": "word " * 2000})
    path.write_bytes(gzip.compress(f"[{', '.join([row] * 4000)}]".encode(), 1))  # 40 MB in one line
    tracemalloc.start()
    assert sum(1 for _ in read_texts(path)) == 4000
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
