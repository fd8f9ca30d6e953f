"""Which teacher may teach which student."""

from dataclasses import replace

import pytest
from helpers import tiny

from hylo_megatron.config.stages import stage_kind
from hylo_megatron.convert.pair import check_pair, padded_rows
from hylo_megatron.errors import HyLoError

STUDENT = tiny.hybrid()


def folders(tmp_path, other_words=0):
    """Two checkpoints' folders, as far as their tokenizers go."""
    for name, words in (("student", tiny.VOCAB), ("teacher", tiny.VOCAB - other_words)):
        (tmp_path / name / "hf").mkdir(parents=True)
        tiny.write_tokenizer(tmp_path / name / "hf", words)
    return tmp_path / "student", tmp_path / "teacher"


@pytest.mark.parametrize("rows", [tiny.VOCAB, tiny.VOCAB + 40])
def test_one_tokenizer_with_other_padding(rows, tmp_path):
    teacher = replace(STUDENT.as_teacher(), vocab_size=rows)
    check_pair(STUDENT, teacher, stage_kind("distill"), folders(tmp_path))
    assert padded_rows(STUDENT, teacher, 16) % 16 == 0
    assert padded_rows(STUDENT, teacher, 16) >= rows


@pytest.mark.parametrize("rows, other_words", [(tiny.VOCAB - 1, 0), (tiny.VOCAB + 40, 20)])
def test_other_tokens(rows, other_words, tmp_path):
    teacher = replace(STUDENT.as_teacher(), vocab_size=rows)
    words = "vocabularies differ" if other_words else "ids up to 299, the model's vocab_size is 299"
    with pytest.raises(HyLoError, match=words):
        check_pair(STUDENT, teacher, stage_kind("distill"), folders(tmp_path, other_words))


@pytest.mark.parametrize("changes, words", [(dict(hidden_size=96), "must be the base model"), (dict(), None)])
def test_layer_by_layer_wants_the_base_model(changes, words, tmp_path):
    teacher = replace(STUDENT.as_teacher(), **changes)
    check_pair(STUDENT, teacher, stage_kind("distill"), folders(tmp_path))
    if words:
        with pytest.raises(HyLoError, match=words):
            check_pair(STUDENT, teacher, stage_kind("ild"), (tmp_path, tmp_path))
