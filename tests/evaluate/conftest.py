"""A small tokenizer, prose and a model folder."""

import pytest
from helpers.evaluation import make_model, make_prose, make_tokenizer, write_lines


@pytest.fixture(scope="session")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="session")
def prose(tmp_path_factory):
    texts = [make_prose(seed, sentences) for seed, sentences in ((0, 200), (1, 3), (2, 1), (3, 40))]
    return write_lines(tmp_path_factory.mktemp("text") / "prose.jsonl", [{"text": text} for text in texts])


@pytest.fixture(scope="session")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path
