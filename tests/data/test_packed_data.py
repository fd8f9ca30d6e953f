"""Packed datasets: what a sample is, in which order samples come, and what does not fit."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from hylo_megatron.packages import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
from hylo_megatron.data.pack import pack  # noqa: E402
from hylo_megatron.data.packed_data import PackedDataset  # noqa: E402
from hylo_megatron.data.token_files import check_packed  # noqa: E402
from hylo_megatron.data.token_writer import token_files  # noqa: E402
from hylo_megatron.engine.register import install  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402

install("megatron")
EOD, LENGTH = 0, 9


def write_documents(out, documents):
    with token_files(out, 1000, (".json",)) as (builder, partial):
        for ids in documents:
            builder.add_document(np.array([*ids, EOD], dtype=builder.dtype), [len(ids) + 1])
        partial[".json"].write_text(json.dumps({"vocab_size": 1000, "eod_id": EOD, "pack_length": None}))
    return out


@pytest.fixture
def documents(tmp_path):
    """Ten documents of 3 to 30 tokens; every token is another one."""
    starts = np.cumsum([1, *range(3, 31, 3)])
    return write_documents(tmp_path / "train", [list(range(a, b)) for a, b in zip(starts, starts[1:], strict=False)])


def dataset(prefix, samples=None, seed=1, answer_weight=0.0, rows=1000) -> PackedDataset:
    config = SimpleNamespace(
        random_seed=seed, sequence_length=LENGTH - 1, mmap_bin_files=True, tokenizer=None, answer_weight=answer_weight,
        split=None, split_matrix=None, allow_ambiguous_pad_tokens=True, rows=rows,
    )  # fmt: skip
    low = PackedDataset.build_low_level_dataset(str(prefix), config)
    split = SimpleNamespace(name="train")
    return PackedDataset(low, str(prefix), np.arange(len(low)), samples, split, config)


def test_a_token_beyond_the_rows_of_the_models_is_refused(documents, tmp_path):
    pack(documents, tmp_path / "packed", LENGTH)
    everything = dataset(tmp_path / "packed")
    largest = max(int(everything[i][key].max()) for i in range(len(everything)) for key in ("tokens", "labels"))
    found = dataset(tmp_path / "packed", rows=largest)
    with pytest.raises(HyLoError, match=f"packed: token {largest}, the models have {largest}"):
        [found[i] for i in range(len(found))]


def test_packed_text_is_the_text(documents, tmp_path):
    summary = pack(documents, tmp_path / "packed", LENGTH)
    stream = [token for row in dataset(tmp_path / "packed").dataset for token in row.tolist()]
    whole = []
    for start, size in zip(np.cumsum([1, *range(3, 31, 3)]), range(3, 31, 3), strict=False):
        whole += [*range(start, start + size), EOD]
    assert stream == whole[: len(stream)]
    assert len(whole) - len(stream) == summary["dropped_tokens"] < LENGTH


def test_tokens_that_are_not_learnt_have_no_loss(documents, tmp_path):
    pack(documents, tmp_path / "packed", LENGTH)
    rows = len(dataset(tmp_path / "packed").dataset)
    mask = np.random.default_rng(0).integers(2, size=(rows, LENGTH), dtype=np.uint8)
    (tmp_path / "packed.learnt.bin").write_bytes(mask.tobytes())
    found = dataset(tmp_path / "packed")
    by_first = {int(found.dataset[i][0]): i for i in range(rows)}
    for sample in (found[i] for i in range(rows)):
        row = by_first[int(sample["tokens"][0])]
        assert sample["loss_mask"].tolist() == mask[row, 1:].tolist()  # of the token that is predicted
    (tmp_path / "packed.learnt.bin").write_bytes(b"1")
    with pytest.raises(HyLoError, match="1 bytes, expected"):
        dataset(tmp_path / "packed")


def test_long_documents_are_never_joined(documents, tmp_path):
    pack(documents, tmp_path / "long", LENGTH, long_documents=True)
    rows = [row.tolist() for row in dataset(tmp_path / "long").dataset]
    assert len(rows) == sum(size // LENGTH for size in range(3, 31, 3))
    assert all(row == list(range(row[0], row[0] + LENGTH)) for row in rows)  # consecutive: one document, no end in it
    with pytest.raises(HyLoError, match="no document of 31 tokens, the longest has 30"):
        pack(documents, tmp_path / "none", 31, long_documents=True)


def test_a_sample_and_its_epochs(documents, tmp_path):
    pack(documents, tmp_path / "packed", LENGTH)
    data = dataset(tmp_path / "packed", samples=50)
    size = len(data.dataset)
    assert len(data) == 50 > 2 * size
    sample = data[3]
    assert torch.equal(sample["tokens"][1:], sample["labels"][:-1])
    assert sample["position_ids"].tolist() == list(range(LENGTH - 1))
    assert sample["loss_mask"].all() and not sample["answer_weight"].any()
    firsts = [int(data[i]["tokens"][0]) for i in range(2 * size)]
    assert sorted(firsts[:size]) == sorted(firsts[size:]) == sorted(int(row[0]) for row in data.dataset)
    assert firsts[:size] != firsts[size:]
    assert firsts == [int(dataset(tmp_path / "packed", samples=50)[i]["tokens"][0]) for i in range(2 * size)]
    assert firsts != [int(dataset(tmp_path / "packed", samples=50, seed=2)[i]["tokens"][0]) for i in range(2 * size)]
    assert int(data[size + 2]["tokens"][0]) == firsts[size + 2]  # any order of access gives the same


def test_answers_weigh_a_share_of_the_sample(documents, tmp_path):
    pack(documents, tmp_path / "packed", LENGTH)
    rows = len(dataset(tmp_path / "packed").dataset)
    answers = np.zeros((rows, LENGTH), np.uint8)
    answers[:, 4:6] = 1
    np.save(tmp_path / "packed.answers.npy", answers)
    weight = dataset(tmp_path / "packed", answer_weight=0.5)[0]["answer_weight"]
    assert weight.tolist() == [0, 0, 0, 2.0, 2.0, 0, 0, 0]  # half of 8 tokens; labels lie one place to the left
    assert dataset(tmp_path / "packed", answer_weight=0.01)[0]["answer_weight"].max() == 1.0  # never below a token's
    assert not dataset(tmp_path / "packed")[0]["answer_weight"].any()
    np.save(tmp_path / "packed.answers.npy", answers[1:])
    with pytest.raises(HyLoError, match=r"answers.npy: uint8 of shape .* expected"):
        dataset(tmp_path / "packed")


def test_the_length_has_to_fit(documents, tmp_path):
    pack(documents, tmp_path / "packed", LENGTH)
    packed, plain = str(tmp_path / "packed"), str(documents)
    assert check_packed([packed], LENGTH - 1)
    assert not check_packed([plain], LENGTH - 1)
    with pytest.raises(HyLoError, match="packed to 9 tokens.*--pack-length 65"):
        check_packed([packed], 64)
    with pytest.raises(HyLoError, match="is not packed"):
        check_packed([packed, plain], LENGTH - 1)
