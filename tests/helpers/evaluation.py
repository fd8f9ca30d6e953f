"""Models, texts and a stub that answers, for tests of the evaluation."""

import json
import random
import re
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hylo_megatron.evaluate.needle import Needle
from hylo_megatron.evaluate.run_task import answerer, run
from hylo_megatron.hf.configuration_hylo import HyLoConfig
from hylo_megatron.hf.modeling_hylo import HyLoForCausalLM

CHAT = (
    "{% for m in messages %}<|user|>{{ m.content }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def write_lines(path, records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def make_prose(seed: int = 0, sentences: int = 300) -> str:
    rng = random.Random(seed)
    nouns = ["garden", "river", "castle", "letter", "window", "market", "shadow", "forest", "bridge", "harbour"]
    adjectives = ["famous", "careful", "active", "visible", "silent", "natural", "pleasant", "endless", "historic"]
    verbs = ["crossed", "watched", "remembered", "followed", "carried", "painted"]
    pick = rng.choice
    return " ".join(
        f"The {pick(adjectives)} {pick(nouns)} slowly {pick(verbs)} the {pick(nouns)}, and nobody saw a {pick(nouns)}."
        for _ in range(sentences)
    )


def make_model(tokenizer, **changes) -> LlamaForCausalLM:
    torch.manual_seed(1)
    sizes = {
        "vocab_size": len(tokenizer),
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "eos_token_id": tokenizer.eos_token_id,
    }
    model = LlamaForCausalLM(LlamaConfig(**{**sizes, **changes})).eval()
    with torch.no_grad():
        model.lm_head.weight.mul_(20)  # far from uniform, so that a wrong target shows
    return model


class Stub:
    """A model that goes on with what ``answer_of`` makes of a prompt's text, one token a call."""

    def __init__(self, tokenizer, answer_of):
        self.tokenizer, self.answer_of, self.calls = tokenizer, answer_of, []
        self.device, self.generation_config = torch.device("cpu"), GenerationConfig(eos_token_id=0)

    def __call__(self, input_ids, past_key_values, use_cache, logits_to_keep, attention_mask=None):
        assert use_cache and logits_to_keep == 1
        self.calls.append(tuple(input_ids.shape))
        if past_key_values is None:
            mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
            texts = [self.tokenizer.decode(row[real.bool()]) for row, real in zip(input_ids, mask, strict=True)]
            past_key_values = [[*self.tokenizer(self.answer_of(text)).input_ids, 0] for text in texts]
        else:
            assert input_ids[:, 0].tolist() == [row[0] for row in past_key_values]
            past_key_values = [row[1:] or [0] for row in past_key_values]
        logits = F.one_hot(torch.tensor([row[0] for row in past_key_values]), len(self.tokenizer))
        return SimpleNamespace(logits=logits[:, None].bfloat16(), past_key_values=past_key_values)


def copy_number(text: str) -> str:
    key = re.search(r"What is the special magic number for (\S+) mentioned", text).group(1)
    assert text.endswith(f"The special magic number for {key} mentioned in the provided text is")
    return " " + re.search(rf"numbers for {key} is: (\d{{7}})\.", text).group(1) + "."


def needles_of(model, tokenizer, file, lengths, depths, samples, seed=0, batch_size=None) -> dict:
    """The results of a needle test."""
    task = Needle(file=file, depths=depths)
    return run(
        task, tokenizer, answerer(model, tokenizer, task, batch_size), lengths=lengths, samples=samples, seed=seed
    )


def naive_losses(model, tokenizer, file, context) -> list[torch.Tensor]:
    """Loss of every token after the first, one document at a time, from the model's full logits."""
    losses = []
    for line in file.read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"]).input_ids[:context]])
        with torch.no_grad():
            losses.append(F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    return losses


def random_hybrid(tokenizer, linear: str) -> HyLoForCausalLM:
    torch.manual_seed(2)
    config = HyLoConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_attention_heads=4, head_dim=8,
        mixers=[linear, "mla", linear], kv_lora_rank=20, qk_nope_head_dim=8, qk_rope_head_dim=8, v_head_dim=8,
        linear_num_key_heads=2, linear_num_value_heads=4, linear_key_head_dim=8, linear_value_head_dim=8,
        mamba_num_heads=4, mamba_head_dim=8, mamba_state_size=8, mamba_num_groups=2, max_position_embeddings=2048,
        eos_token_id=tokenizer.eos_token_id, initializer_range=0.4,
    )  # fmt: skip
    return HyLoForCausalLM(config).eval()


def make_tokenizer() -> PreTrainedTokenizerFast:
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    raw.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    raw.train_from_iterator(
        [make_prose()], trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, special_tokens=special)
    )
    return PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<|end|>", pad_token="<|end|>", chat_template=CHAT)
