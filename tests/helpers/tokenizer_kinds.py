"""Folders with tokenizers of the kinds that base models have, under class names that fit them and that do not."""

import json
from pathlib import Path

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer, UnigramTrainer, WordLevelTrainer

from hylo_megatron.hf import HyLoConfig

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>"]
CORPUS = [
    "The quick brown fox jumps over the lazy dog.", "In 2024 there were 12345 ships, and 7 sails.\n\n  def f(x):",
    "Ünïcödé — naïve café 你好 🙂", "a\tb\r\nc   d",
]  # fmt: skip
PROBES = [
    *CORPUS, "  two spaces before", "behind  ", "\n", "", "x<|im_start|>user\nhi</s> y", "é é", "0 00 1234567",
]  # fmt: skip


def byte_level(pre_tokenizer=None) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return _trained(tokenizer, BpeTrainer, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def single_digits() -> Tokenizer:
    digits = pre_tokenizers.Digits(individual_digits=True)
    return byte_level(pre_tokenizers.Sequence([digits, pre_tokenizers.ByteLevel(add_prefix_space=False)]))


def split_by_regex() -> Tokenizer:
    """Llama 3's way: a pattern of its own before the bytes, and BOS from the post-processor."""
    split = pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}|\s+|[^\s\p{L}\p{N}]+"), "isolated")
    tokenizer = byte_level(
        pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    )
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def sentencepiece_bpe() -> Tokenizer:
    """Llama 2's way: a normalizer that writes the spaces."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    return _trained(tokenizer, BpeTrainer)


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    return _trained(tokenizer, UnigramTrainer, unk_token="<unk>", vocab_size=200)


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    return _trained(tokenizer, WordLevelTrainer)


def _trained(tokenizer: Tokenizer, trainer, **settings) -> Tokenizer:
    special = [AddedToken(token, special=True, normalized=False) for token in SPECIAL]
    settings = {"vocab_size": 330, "show_progress": False, "special_tokens": special} | settings
    tokenizer.train_from_iterator(4 * CORPUS, trainer(**settings))
    return tokenizer


KINDS = [byte_level, single_digits, split_by_regex, sentencepiece_bpe, unigram, word_level]
CLASSES = ["LlamaTokenizerFast", "LlamaTokenizer", "GPT2Tokenizer", "Qwen2Tokenizer", "PreTrainedTokenizerFast", None]


def write(folder: Path, tokenizer: Tokenizer, named: str | None = None, model_type: str = "", **config) -> Path:
    """``named``: the class in tokenizer_config.json; ``model_type``: of a config.json beside it."""
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    written = {"tokenizer_class": named} if named else {}
    (folder / "tokenizer_config.json").write_text(json.dumps(written | {"eos_token": "</s>"} | config))
    if model_type == "hylo":
        HyLoConfig(mixers=["mla", "gdn"]).save_pretrained(folder)
    elif model_type:
        (folder / "config.json").write_text(json.dumps({"model_type": model_type}))
    return folder


def added(content: str, number: int, **flags) -> dict:
    """An added token of tokenizer.json."""
    plain = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    return {"id": number, "content": content} | plain | flags
