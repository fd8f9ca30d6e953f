"""``PROXY=1``: a recipe at toy size with a random model and synthetic text, to run every step on a CPU.

Layer plan, order of the stages, learning rates and flags stay; widths, lengths and counts shrink.
"""

import json
import random
from dataclasses import replace
from pathlib import Path

from hylo_megatron.config import Architecture, Geometry, geometry_preset
from hylo_megatron.mixers import MIXERS
from hylo_megatron.mixers.dimensions import shrunk
from hylo_megatron.recipes.published import BASES, Base, yarn
from hylo_megatron.recipes.stage import Evaluation, Recipe

LENGTHS = {2048: 64, 8192: 128, 65536: 256}
WINDOWS = {2048: 64, 32768: 128}  # each window has the same place among the lengths
WIDTH, HEADS = 16, 4  # factors by which the model's width and its number of heads shrink
STEPS, BATCH, VOCAB = 4, 2, 900
SMALL = Evaluation(context=64, tokens=400, needle_lengths=(256,), needle_samples=1, needle_depths=2)
CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}" + (
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def proxy(recipe: Recipe, base: Base, steps: int = STEPS) -> Recipe:
    """Return ``recipe`` with every size made small and nothing else changed."""
    stages = tuple(
        replace(
            stage, seq_length=LENGTHS[stage.seq_length], steps=steps, global_batch=BATCH, micro_batch=1,
            rope=stage.rope and yarn(LENGTHS[stage.seq_length], WINDOWS[base.window]),
            teacher_rope=stage.teacher_rope and yarn(LENGTHS[stage.seq_length], WINDOWS[base.window]),
        )
        for stage in recipe.stages
    )  # fmt: skip
    return replace(
        recipe, name=f"proxy-{recipe.name}", stages=stages, calibration_tokens=1024, calibration_length=64,
        save_every=2, evaluation=SMALL,
        geometry=small_geometry(base) if recipe.geometry == "published" else recipe.geometry,
    )  # fmt: skip


def small_geometry(base: Base) -> Geometry:
    g = geometry_preset("published", base.hidden, base.heads, base.head_dim)
    kinds = {name: entry for name, entry in MIXERS.items() if entry.geometry}
    return Geometry(
        **{name: shrunk(entry, entry.dimensions(g), heads=HEADS, width=WIDTH) for name, entry in kinds.items()}
    )


def toy_shape(arch: Architecture) -> Architecture:
    """Return a Transformer with the layers of ``arch`` that a CPU trains in seconds."""
    return replace(
        arch, vocab_size=VOCAB, hidden_size=arch.hidden_size // WIDTH,
        intermediate_size=arch.hidden_size // WIDTH * 2, num_attention_heads=arch.num_attention_heads // HEADS,
        num_key_value_heads=max(1, arch.num_key_value_heads // HEADS), head_dim=arch.head_dim // HEADS,
    )  # fmt: skip


def toy_recipe(recipe: Recipe) -> Recipe:
    """Return ``recipe`` with the geometry of ``toy_shape``'s student."""
    return replace(recipe, geometry=small_geometry(BASES[recipe.name])) if recipe.name in BASES else recipe


def write_inputs(folder: Path, base: Base) -> None:
    texts = made_up_texts()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    write_model(folder / "model", base, texts)


def made_up_texts(documents: int = 60) -> list[str]:
    rng = random.Random(1)
    words = [a + b + c for a in ("ba", "lo", "ri", "tu", "me") for b in ("n", "st", "v") for c in ("er", "al", "or")]
    return [
        " ".join(" ".join(rng.choices(words, k=9)).capitalize() + "." for _ in range(rng.randint(20, 400)))
        for _ in range(documents)
    ]


def write_model(folder: Path, base: Base, texts: list[str], **changes) -> None:
    """Write a Hugging Face folder. ``changes``: other fields of its config."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    scratch = folder.with_name(folder.name + ".partial")
    scratch.mkdir(parents=True, exist_ok=True)
    size = write_tokenizer(scratch, texts)
    tokens = dict(eos_token_id=2, bos_token_id=None, pad_token_id=None)
    values = small_values(base, size) | tokens | dict(initializer_range=0.05) | changes
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(base.model_type, **values)).save_pretrained(scratch)
    scratch.rename(folder)


def small_values(base: Base, vocab: int) -> dict:
    """Return small sizes for ``base`` under the names of its config."""
    rope = {"rope_type": "default", "rope_theta": 1e6}
    if base.model_type == "llama":
        rope = {"rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 64}  # fmt: skip
    return dict(
        vocab_size=vocab, hidden_size=base.hidden // WIDTH, intermediate_size=base.hidden // WIDTH * 2,
        num_hidden_layers=base.layers, num_attention_heads=base.heads // HEADS, num_key_value_heads=base.kv_heads // 4,
        head_dim=base.head_dim // HEADS, max_position_embeddings=1024, rope_parameters=rope, rms_norm_eps=1e-5,
        tie_word_embeddings=True,
    )  # fmt: skip


def write_tokenizer(folder: Path, texts: list[str]) -> int:
    """Write a byte-level tokenizer with a chat template, and return its number of tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    from hylo_megatron.retrieval import templates

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator([*texts, *(fact.statement for fact in templates.FACTS)], trainer)
    tokenizer.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>", "chat_template": CHAT}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return tokenizer.get_vocab_size()
