"""Long documents are cut on their own, into windows of one length."""

import json

import pytest
from helpers.token_files import read_back

from hylo_megatron.data import documents, prepare
from hylo_megatron.errors import HyLoError


def test_long_documents_are_cut_on_their_own(tokenizer_folder, tmp_path):
    texts = ["short", "long " * 90, "", "tiny", "longer " * 120]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    prepare.prepare([tmp_path / "in.jsonl"], tokenizer_folder, tmp_path / "whole", append_eod=False)
    documents = read_back(tmp_path / "whole")
    summary = prepare.prepare(
        [tmp_path / "in.jsonl"], tokenizer_folder, tmp_path / "out", pack_length=32, long_documents=True
    )
    expected = [ids[at : at + 32] for ids in documents for at in range(0, len(ids) - 31, 32)]
    assert read_back(tmp_path / "out") == expected and len(expected) > 3
    assert not any(summary["eod_id"] in row for row in expected)
    assert (summary["documents"], summary["skipped_documents"], summary["empty_documents"]) == (2, 2, 1)
    assert summary["dropped_tokens"] == sum(map(len, documents)) - summary["tokens"] > 0
    assert summary["pack_length"] == 32 and not summary["append_eod"]


@pytest.mark.parametrize("length, windows", [(32, 1), (33, 0)])
def test_a_document_is_long_from_the_very_length_on(tokenizer_folder, tmp_path, length, windows):
    path = tmp_path / "in.txt"
    path.write_text("z" * 32)  # no merges: a token each
    options = {"pack_length": length, "long_documents": True}
    if windows:
        summary = prepare.prepare([path], tokenizer_folder, tmp_path / "out", **options)
        assert (summary["sequences"], summary["dropped_tokens"]) == (1, 0)
        return
    with pytest.raises(HyLoError, match="no document has the 33 tokens of --pack-length, the longest has 32"):
        prepare.prepare([path], tokenizer_folder, tmp_path / "out", **options)
    assert [item.name for item in tmp_path.iterdir()] == ["in.txt"]


def test_long_documents_read_in_blocks_are_cut_the_same(tokenizer_folder, tmp_path, monkeypatch):
    path = tmp_path / "book.txt"
    path.write_text("First line.\nsecond one\n\n\n    indented\n\n\tmore\nlast   \n\nend." * 5)
    options = {"pack_length": 40, "long_documents": True}
    prepare.prepare([path], tokenizer_folder, tmp_path / "whole", **options)
    monkeypatch.setattr(documents, "BLOCK", 1)
    prepare.prepare([path], tokenizer_folder, tmp_path / "blocks", **options)
    assert len(read_back(tmp_path / "whole")) > 1
    assert (tmp_path / "blocks.bin").read_bytes() == (tmp_path / "whole.bin").read_bytes()


def test_long_documents_need_a_length(tokenizer_folder, jsonl, tmp_path, capsys):
    arguments = ["--input", str(jsonl), "--tokenizer", str(tokenizer_folder), "--out", str(tmp_path / "out")]
    with pytest.raises(SystemExit) as caught:
        prepare.main([*arguments, "--long-documents"])
    assert caught.value.code == 2 and "--pack-length" in capsys.readouterr().err
    prepare.main([*arguments, "--long-documents", "--pack-length", "30"])
    assert "2 shorter documents skipped" in capsys.readouterr().out
