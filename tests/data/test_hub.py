"""Data sets that the package ``datasets`` opens, without a network."""

import pytest
from helpers import text

from hylo_megatron import packages
from hylo_megatron.data import prepare as command
from hylo_megatron.data.hub import HubDataset, text_input
from hylo_megatron.errors import HyLoError

datasets = pytest.importorskip("datasets")
pytest.importorskip("megatron.core")
ROWS = [{"text": "the quick brown fox"}, {"text": None}, {"text": "assistant user"}]


@pytest.fixture
def tokenizer(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    return text.make_tokenizer(tmp_path / "tokenizer")


def prepared(tokenizer, tmp_path, *flags) -> tuple[int, list[list[int]]]:
    out = tmp_path / "tokens"
    command.main([*map(str, flags), "--tokenizer", str(tokenizer), "--out", str(out), "--workers", "1"])
    return text.read_rows(out)


def test_every_way_to_a_data_set_gives_the_tokens_of_the_file(tokenizer, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    lines = text.write(folder / "train.jsonl", *ROWS)
    expected = prepared(tokenizer, tmp_path, "--input", lines)
    assert len(expected) == 2
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(tmp_path / "saved")
    datasets.DatasetDict({"train": saved, "test": saved.select([0])}).save_to_disk(tmp_path / "both")
    arrow = next((tmp_path / "saved").glob("*.arrow"))
    for given in (f"hf://{folder}", f"hf://{folder}@train", tmp_path / "saved", tmp_path / "both", arrow):
        assert prepared(tokenizer, tmp_path, "--input", given) == expected, given
    assert prepared(tokenizer, tmp_path, "--dataset", folder) == expected
    assert prepared(tokenizer, tmp_path, "--input", f"hf://{tmp_path / 'both'}@test") == expected[:1]


def test_a_split_of_data_without_splits_is_refused(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "saved", next((tmp_path / "saved").glob("*.arrow"))):
        with pytest.raises(HyLoError, match="has no splits: leave @test out"):
            next(HubDataset.parse(f"hf://{path}@test").rows())


def test_versions_that_run_loading_scripts_are_refused(tmp_path, monkeypatch):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    monkeypatch.setattr(datasets, "__version__", "3.6.0")
    with pytest.raises(HyLoError, match="datasets 3.6.0 may run code .*pip install 'datasets>=4'"):
        next(text_input(str(tmp_path / "saved")).rows())


def test_chats_of_a_data_set(tokenizer, tmp_path):
    lines = text.write(tmp_path / "chats.jsonl", text.HELLO)
    datasets.Dataset.from_list([text.HELLO]).save_to_disk(tmp_path / "saved")
    expected = prepared(tokenizer, tmp_path, "--input", lines)
    assert prepared(tokenizer, tmp_path, "--input", tmp_path / "saved") == expected


def test_names():
    assert text_input("hf://datasets/a/b:main@train[:10]") == HubDataset("a/b", "main", "train[:10]")
    assert str(HubDataset.parse("a/b")) == "hf://a/b@train"
    with pytest.raises(HyLoError, match="expected a data set such as hf://OWNER/NAME"):
        HubDataset.parse("hf://")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--input", "hf://no-such-folder/for-this-test@nowhere"], "check the name, :CONFIG and @SPLIT"),
        (["--input", "hf://any", "--format", "text"], "has rows, which --format text does not read"),
        ([], "no text given"),
    ],
)
def test_refused_in_one_line(tokenizer, tmp_path, flags, message, capsys, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(SystemExit):
        prepared(tokenizer, tmp_path, *flags)
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_without_the_package(monkeypatch):
    missing = packages.Capability("datasets", False, None, "data sets")
    monkeypatch.setattr(packages, "capabilities", lambda: {"datasets": missing})
    with pytest.raises(HyLoError, match="hf://a/b@train needs datasets.*pip install 'datasets>=4'"):
        next(HubDataset("a/b").rows())
