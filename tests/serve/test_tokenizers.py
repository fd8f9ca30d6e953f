"""The transformers that vLLM brings makes of an exported folder the ids that training saw."""

import pytest
from helpers import tokenizer_kinds as kinds
from transformers import AutoTokenizer

import hylo_megatron  # noqa: F401
from hylo_megatron.convert.tokenizer_files import copy_companions, tokenizer_identity


@pytest.mark.parametrize("named", kinds.CLASSES)
@pytest.mark.parametrize("kind", kinds.KINDS, ids=lambda kind: kind.__name__)
def test_served_ids_are_those_of_tokenizer_json(kind, named, tmp_path):
    raw = kind()
    teacher = kinds.write(tmp_path / "hf", raw, named, "llama")
    copy_companions(teacher, tmp_path / "out")
    earlier = kinds.write(tmp_path / "earlier", raw, named, "hylo")  # an export that kept the class
    for folder in (tmp_path / "out", earlier):
        served = AutoTokenizer.from_pretrained(folder)
        for text in kinds.PROBES:
            for special in (False, True):
                want = raw.encode(text, add_special_tokens=special).ids
                assert served(text, add_special_tokens=special).input_ids == want, (folder, text)
    assert tokenizer_identity(tmp_path / "out") == tokenizer_identity(teacher)
