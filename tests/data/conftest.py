"""A folder with a tiny tokenizer, and a file of texts."""

import json

import pytest
from helpers.token_files import TEMPLATE, TEXTS


@pytest.fixture(scope="session")
def tokenizer_folder(tmp_path_factory):
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    blank = ["x\n\n\n    y\n\n\tz"] * 50  # so that line ends join into longer tokens
    tokenizer.train_from_iterator(
        [*TEXTS, *blank],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
            show_progress=False,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        ),
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps(
            {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": TEMPLATE}
        )
    )
    return folder


@pytest.fixture
def jsonl(tmp_path):
    path = tmp_path / "in.jsonl"
    path.write_text(
        "".join(json.dumps({"text": t}) + "\n" for t in TEXTS[:2])
        + "\n"
        + '{"text": ""}\n'
        + json.dumps({"text": TEXTS[2]}),
        encoding="utf-8",
    )
    return path
