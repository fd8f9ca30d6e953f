"""Prose and tokenizers for the tests of RULER: two kinds whose tokens end at spaces, and one whose tokens do not."""

import random
from functools import lru_cache

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from hylo_megatron.evaluate.ruler import counting, niah, qa, tracking

CHAT = (
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
SPECIAL = ["<unk>", "<s>", "<|end|>", "<|user|>", "<|assistant|>"]
WORDS = [
    a + b + c for a in ("stor", "gar", "bren", "mil", "fal", "hod", "win") for b in ("de", "ma", "li", "no")
    for c in ("wick", "tone", "ful", "ber", "less", "ent")
]  # fmt: skip


def make_prose(seed: int, sentences: int) -> str:
    pick = random.Random(seed).choice
    return " ".join(
        f"The {pick(WORDS)} {pick(WORDS)} met a {pick(WORDS)}, and nobody saw the {pick(WORDS)} {pick(WORDS)}."
        for _ in range(sentences)
    )


def wording() -> list[str]:
    modules = (niah, tracking, counting, qa)
    return [
        value for module in modules for name, value in vars(module).items() if name.isupper() and type(value) is str
    ]


def byte_level(chat_template=CHAT) -> PreTrainedTokenizerFast:
    """SmolLM2's way: single digits, then bytes."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    return trained(raw, chat_template, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def points_with_line_ends() -> PreTrainedTokenizerFast:
    """Llama 3's way: a line end belongs to the point before it, and BOS stands first."""
    raw = Tokenizer(models.BPE())
    pattern = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(pattern, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    raw.decoder = decoders.ByteLevel()
    raw.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return trained(raw, None, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())


def merging() -> PreTrainedTokenizerFast:
    """Tokens that reach across spaces and points."""
    raw = Tokenizer(models.BPE(unk_token="<unk>"))
    raw.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    raw.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    alphabet = [chr(code) for code in range(32, 127)] + ["\n", "▁"]
    return trained(raw, None, initial_alphabet=alphabet)


def trained(raw: Tokenizer, chat_template, **settings) -> PreTrainedTokenizerFast:
    texts = [*make_prose(1, 120).split(". "), *wording() * 3, " ".join(map(str, range(300)))]
    trainer = trainers.BpeTrainer(vocab_size=1200, special_tokens=SPECIAL, show_progress=False, **settings)
    raw.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", chat_template=chat_template)


KINDS = {"byte_level": byte_level, "line_ends": points_with_line_ends, "merging": merging}


@lru_cache
def tokenizer_of(kind: str) -> PreTrainedTokenizerFast:
    return KINDS[kind]()
