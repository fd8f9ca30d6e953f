"""Evaluation against naive computations, a stub that finds (or misses) needles, and the files a report leaves."""

import json
import math
import random
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import Settings, evaluate, needles_of, perplexity_of
from hylo_megatron.evaluate import models as hf_models
from hylo_megatron.evaluate.needle import FACT, Haystack, answer_batch, encode_prompt, first_number, make_needle
from hylo_megatron.evaluate.plots import read_log, running_mean

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


@pytest.fixture(scope="module")
def tokenizer():
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


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    texts = [make_prose(seed, sentences) for seed, sentences in ((0, 200), (1, 3), (2, 1), (3, 40))]
    return write_lines(tmp_path_factory.mktemp("text") / "prose.jsonl", [{"text": text} for text in texts])


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tokenizer):
    path = tmp_path_factory.mktemp("models") / "tiny"
    make_model(tokenizer).save_pretrained(path)
    tokenizer.save_pretrained(path)
    return path


def naive_losses(model, tokenizer, file, context) -> list[torch.Tensor]:
    """Loss of every token after the first, one document at a time, from the model's full logits."""
    losses = []
    for line in file.read_text().splitlines():
        ids = torch.tensor([tokenizer(json.loads(line)["text"]).input_ids[:context]])
        with torch.no_grad():
            losses.append(F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none"))
    return losses


@pytest.mark.parametrize(("chunk", "batch_size"), [(1024, 1), (7, 3), (64, 4)])
def test_perplexity_equals_full_logits(tokenizer, prose, chunk, batch_size):
    model = make_model(tokenizer)
    found = perplexity_of(model, tokenizer, prose, context=300, max_tokens=10**6, chunk=chunk, batch_size=batch_size)
    losses = naive_losses(model, tokenizer, prose, 300)
    expected = torch.cat(losses)
    assert found["tokens"] == len(expected) and found["documents"] == 4
    assert found["perplexity"] == pytest.approx(expected.mean().exp().item(), rel=1e-4)
    assert [(row["from"], row["to"]) for row in found["by_position"]] == [(0, 128), (128, 256), (256, 300)]
    for row in found["by_position"]:  # losses[i][p - 1] is the loss of position p
        part = torch.cat([loss[max(0, row["from"] - 1) : row["to"] - 1] for loss in losses])
        assert (row["tokens"], row["loss"]) == (len(part), pytest.approx(part.mean().item(), rel=1e-4))


def test_perplexity_of_a_uniform_model_is_the_vocabulary(tokenizer, prose):
    model = make_model(tokenizer)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert perplexity_of(model, tokenizer, prose)["perplexity"] == pytest.approx(len(tokenizer), rel=1e-4)
    model.lm_head.weight.data.fill_(math.nan)
    with pytest.raises(HyLoError, match="not a finite number"):
        perplexity_of(model, tokenizer, prose)


def test_perplexity_stops_at_the_token_budget(tokenizer, prose):
    model = make_model(tokenizer)
    found = perplexity_of(model, tokenizer, prose, context=64, max_tokens=100)
    first, second, *_ = naive_losses(model, tokenizer, prose, 64)
    assert found["tokens"] == 100 and found["documents"] == 2
    expected = torch.cat([first, second[:37]])
    assert found["loss"] == pytest.approx(expected.mean().item(), rel=1e-4)


def stub(tokenizer, answer_of):
    """A model whose ``generate`` appends what ``answer_of`` makes of the prompt's text; padding is on the left."""

    def generate(input_ids, attention_mask, max_new_tokens, pad_token_id, **_):
        rows = []
        for ids, mask in zip(input_ids, attention_mask, strict=True):
            assert mask.tolist() == sorted(mask.tolist()), "padding is not on the left"
            answer = tokenizer(answer_of(tokenizer.decode(ids[mask.bool()]))).input_ids[:max_new_tokens]
            rows.append(torch.tensor(answer + [pad_token_id] * (max_new_tokens - len(answer))))
        return torch.cat([input_ids, torch.stack(rows)], dim=1)

    return SimpleNamespace(generate=generate, device=torch.device("cpu"))


def copy_number(text: str) -> str:
    key = re.search(r"What is the special magic number for (\S+) mentioned", text).group(1)
    assert text.endswith(f"The special magic number for {key} mentioned in the provided text is")
    return " " + re.search(rf"numbers for {key} is: (\d{{7}})\.", text).group(1) + "."


def test_needles_are_found_by_a_model_that_copies(tokenizer, prose):
    grid = {"lengths": (500, 700), "depths": 3, "samples": 2, "batch_size": 4}
    found = needles_of(stub(tokenizer, copy_number), tokenizer, prose, **grid)
    assert found["accuracy"] == 1.0 and len(found["samples"]) == 12
    grid_cells = [(length, depth) for length in (500, 700) for depth in (0.0, 0.5, 1.0)]
    assert [(cell["length"], cell["depth"]) for cell in found["cells"]] == grid_cells
    assert len({sample["value"] for sample in found["samples"]}) == 12
    for seed, same in ((0, True), (1, False)):
        again = needles_of(stub(tokenizer, copy_number), tokenizer, prose, **grid, seed=seed)
        assert (again["samples"] == found["samples"]) is same


@pytest.mark.parametrize(
    "answer_of",
    [
        lambda text: " not mentioned.",
        lambda text: copy_number(text)[:-2] + ".",  # six of seven digits
        lambda text: " 12" + copy_number(text),  # another number first
    ],
)
def test_wrong_answers_are_misses(tokenizer, prose, answer_of):
    found = needles_of(stub(tokenizer, answer_of), tokenizer, prose, lengths=(500,), depths=2, samples=2)
    assert found["accuracy"] == 0.0 and all(cell["hits"] == 0 for cell in found["cells"])


def test_first_number():
    assert first_number(" 1234567. 7654321") == "1234567"
    assert first_number("1,234,567") == "1234567"
    assert first_number("1234567,890") == "1234567"
    assert first_number("none") == ""


@pytest.mark.parametrize("length", [450, 1000, 1900])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
def test_length_and_depth_in_tokens(tokenizer, prose, length, depth):
    haystack = Haystack(prose, tokenizer)
    needle = make_needle(haystack, length, depth, random.Random(length))
    assert length - 12 - 10 <= len(needle.ids) <= length - 12  # full but for a word, and room for the answer
    text = tokenizer.decode(list(needle.ids))
    fact = FACT.format(key=needle.key, value=needle.value)
    begin, end = text.index("afterwards.\n") + len("afterwards.\n"), text.index("\nWhat is the special")
    before, after = (len(tokenizer(part).input_ids) for part in text[begin:end].split(fact))
    sentence = max(haystack.lengths)
    assert abs(before / (before + after) - depth) * (before + after) <= sentence / 2 + 3
    assert abs(needle.placed_depth - before / (before + after)) < 0.02
    with pytest.raises(HyLoError, match="too short"):
        make_needle(haystack, 60, depth, random.Random(0))


def test_left_padding_does_not_change_answers(tokenizer, prose):
    haystack, model = Haystack(prose, tokenizer), make_model(tokenizer, initializer_range=0.4)
    needles = [make_needle(haystack, length, 0.5, random.Random(length)) for length in (450, 500, 600)]
    alone = [answer_batch(model, tokenizer, [needle])[0] for needle in needles]
    assert answer_batch(model, tokenizer, needles) == alone and len(set(alone)) > 1


def test_prompt_uses_the_chat_template(tokenizer):
    chat = tokenizer.decode(encode_prompt(tokenizer, "Text.", "old-key"))
    assert chat.startswith("<|user|>Some special") and "provided text?<|assistant|>The special" in chat
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert plain.decode(encode_prompt(plain, "Text.", "old-key")).startswith("Some special")


def test_report_files(tmp_path, folder, prose):
    log = tmp_path / "train.jsonl"
    lines = [{"stage": stage, "iteration": i, "loss": 5 / i} for stage in ("ild", "kl") for i in range(1, 60)]
    write_lines(log, [{"event": "start"}, *lines])
    with log.open("a") as file:
        file.write('{"stage": "kl", "itera')  # stopped while writing
    settings = Settings(context=128, ppl_tokens=300, needle_lengths=(450,), needle_samples=1, needle_depths=2)
    out = tmp_path / "out"
    files = {"out_dir": out, "prose": prose, "code": prose, "curves": [log]}
    report = evaluate(folder, teacher_dir=folder, settings=settings, **files)
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(report))
    assert report["model"]["name"] == "tiny" and report["model"]["kv_cache_bytes_per_token"] == 2 * (2 * 2 * 8 * 2)
    assert report["ratios"] == {"kv_cache": 1.0, "perplexity_prose": 1.0, "perplexity_code": 1.0}
    assert report["model"]["perplexity"]["prose"]["tokens"] == 300
    for name in ("needle.png", "loss_curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    text = (out / "evaluation.md").read_text()
    assert "|  | teacher | model | ratio |" in text and "| needle, 450 tokens |" in text
    assert f"{report['model']['perplexity']['prose']['perplexity']:.3f}" in text
    assert not list(out.glob("*.partial*")) and str(tmp_path) not in text + (out / "evaluation.json").read_text()


def test_model_alone_without_needles(tmp_path, folder, prose):
    report = evaluate(folder, out_dir=tmp_path, prose=prose, settings=Settings(ppl_tokens=60, skip=("needle",)))
    assert "teacher" not in report and "needle" not in report["model"] and report["ratios"] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["evaluation.json", "evaluation.md"]


def test_cache_of_a_hybrid_counts_mla_rows():
    mixers = ["gdn", "mla", "gdn", "mamba2", "mla"]
    config = SimpleNamespace(model_type="hylo", mixers=mixers, kv_lora_rank=256, qk_rope_head_dim=64)
    assert hf_models.kv_bytes_per_token(config) == 2 * 2 * (256 + 64)


def test_log_of_a_resumed_run(tmp_path):
    records = [{"stage": "kl", "iteration": i, "loss": loss} for i, loss in ((1, 3.0), (2, 9.0), (2, 2.0), (3, 1.0))]
    assert read_log(write_lines(tmp_path / "log.jsonl", records)) == {"kl": [(1, 3.0), (2, 2.0), (3, 1.0)]}
    assert running_mean([4.0, 2.0, 6.0, 1.0], 2) == [4.0, 4.0, 3.0, 3.5]


def test_bad_paths_and_settings(tmp_path, folder, prose):
    bad_line = tmp_path / "bad.jsonl"
    bad_line.write_text('{"text": "fine"}\n{"words": 3}\n')
    empty = tmp_path / "empty"
    empty.mkdir()
    for message, model, options in (
        ("model folder .* not found", tmp_path / "absent", {}),
        ("no config.json", empty, {}),
        ("model folder .* not found", folder, {"teacher_dir": tmp_path / "absent"}),
        ("text file .* not found", folder, {"prose": tmp_path / "absent.jsonl"}),
        ("line 2: expected an object", folder, {"prose": bad_line}),
        ("training log .* not found", folder, {"out_dir": tmp_path / "out", "curves": [tmp_path / "absent.jsonl"]}),
        ("device 'abacus'", folder, {"settings": Settings(device="abacus")}),
        ("dtype 'int3'", folder, {"settings": Settings(dtype="int3")}),
    ):
        with pytest.raises(HyLoError, match=message):
            evaluate(model, **options)
    for wrong in ({"context": 0}, {"needle_lengths": ()}, {"skip": ("all",)}, {"batch_size": 0}):
        with pytest.raises(HyLoError):
            Settings(**wrong)


def test_folder_that_does_not_fit(tmp_path, tokenizer):
    small, thin = tmp_path / "small", tmp_path / "thin"
    make_model(tokenizer, vocab_size=len(tokenizer) - 1).save_pretrained(small)
    make_model(tokenizer).save_pretrained(thin)
    config = json.loads((thin / "config.json").read_text())
    (thin / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    for path, message in ((small, "another model"), (thin, "weights are missing")):
        with pytest.raises(HyLoError, match="tokenizer cannot be read"):
            evaluate(path)
        tokenizer.save_pretrained(path)
        with pytest.raises(HyLoError, match=message):
            evaluate(path)


def test_tool_reports_a_bad_path_in_one_line(tmp_path):
    tool = Path(__file__).parents[1] / "tools" / "evaluate.py"
    command = [sys.executable, tool, "--model", tmp_path / "absent", "--out", tmp_path / "out", "--prose", "p.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and re.fullmatch(r"error: model folder .* not found.*\n", done.stderr), done.stderr
