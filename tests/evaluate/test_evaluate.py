"""Evaluation against naive computations, a stub that finds (or misses) needles, and the files a report leaves."""

import json
import math
import random
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers.paths import ROOT
from helpers.waits import PATIENCE
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import Settings, evaluate, long_documents_of, needles_of, perplexity_of
from hylo_megatron.evaluate import models as hf_models
from hylo_megatron.evaluate.greedy import greedy
from hylo_megatron.evaluate.needle import answer_batch, batches, first_number, wilson
from hylo_megatron.evaluate.plots import read_log, running_mean
from hylo_megatron.evaluate.prompts import (
    FACT,
    NeedlePrompt,
    Prose,
    encode_start,
    make_needle,
    make_needles,
    prompt_text,
)
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


def test_perplexity_of_whole_documents_takes_every_window(tokenizer, tmp_path):
    model, text = make_model(tokenizer), " ".join(f"word {i}" for i in range(90))
    (tmp_path / "book.jsonl").write_text(json.dumps({"text": text}) + "\n" + json.dumps({"text": text}) + "\n")
    ids = tokenizer(text).input_ids
    cut = perplexity_of(model, tokenizer, tmp_path / "book.jsonl", context=64)
    whole = perplexity_of(model, tokenizer, tmp_path / "book.jsonl", context=64, whole=True)
    windows = -(-len(ids) // 64)
    assert cut["documents"] == 2 and whole["documents"] == 2 * windows
    assert whole["tokens"] == 2 * (len(ids) - windows)
    some = perplexity_of(model, tokenizer, tmp_path / "book.jsonl", context=64, max_tokens=100, whole=True)
    assert some["tokens"] == 100 and some["documents"] == 2


class Stub:
    """A model that goes on with what ``answer_of`` makes of a prompt's text, one token a call."""

    def __init__(self, tokenizer, answer_of):
        self.tokenizer, self.answer_of, self.calls = tokenizer, answer_of, []
        self.device, self.generation_config = torch.device("cpu"), GenerationConfig(eos_token_id=0)

    def __call__(self, input_ids, past_key_values, use_cache, logits_to_keep):
        assert use_cache and logits_to_keep == 1
        self.calls.append(tuple(input_ids.shape))
        if past_key_values is None:
            texts = self.tokenizer.batch_decode(input_ids)
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


def test_needles_are_found_by_a_model_that_copies(tokenizer, prose):
    grid = {"lengths": (500, 700), "depths": 3, "samples": 2, "batch_size": 4}
    found = needles_of(Stub(tokenizer, copy_number), tokenizer, prose, **grid)
    assert found["accuracy"] == 1.0 and len(found["samples"]) == 12
    grid_cells = [(length, depth) for length in (500, 700) for depth in (0.0, 0.5, 1.0)]
    assert [(cell["length"], cell["depth"]) for cell in found["cells"]] == grid_cells
    assert len({sample["value"] for sample in found["samples"]}) == 12
    for seed, same in ((0, True), (1, False)):
        again = needles_of(Stub(tokenizer, copy_number), tokenizer, prose, **grid, seed=seed)
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
    found = needles_of(Stub(tokenizer, answer_of), tokenizer, prose, lengths=(500,), depths=2, samples=2)
    assert found["accuracy"] == 0.0 and all(cell["hits"] == 0 for cell in found["cells"])


def test_first_number():
    assert first_number(" 1234567. 7654321") == "1234567"
    assert first_number("1,234,567") == "1234567"
    assert first_number("1234567,890") == "1234567"
    assert first_number("none") == ""


def test_wilson_interval():
    for hits, samples, low, high in ((93, 100, 0.8625, 0.9657), (0, 100, 0.0, 0.0370), (4, 4, 0.5101, 1.0)):
        assert wilson(hits, samples) == pytest.approx((low, high), abs=1e-4)


def test_lengths_are_summed_over_depths(tokenizer, prose):
    """A model that finds what lies in the second half."""

    def answer_of(text):
        return copy_number(text) if text.index("One of the special magic numbers for") > len(text) / 2 else " 7."

    grid = {"lengths": (500, 700), "depths": 4, "samples": 3}
    found = needles_of(Stub(tokenizer, answer_of), tokenizer, prose, **grid)
    low, high = wilson(6, 12)
    rows = [{"hits": 6, "samples": 12, "accuracy": 0.5, "low": low, "high": high, "length": n} for n in (500, 700)]
    assert found["by_length"] == rows and found["accuracy"] == 0.5
    assert [cell["hits"] for cell in found["cells"]] == [0, 0, 3, 3] * 2


@pytest.mark.parametrize("length", [450, 1000, 1900])
@pytest.mark.parametrize("depth", [0.0, 0.25, 0.5, 1.0])
@pytest.mark.parametrize("joins", [True, False])
def test_length_and_depth_in_tokens(tokenizer, prose, length, depth, joins):
    haystack = Prose(prose, tokenizer)
    assert haystack.joins
    haystack.joins = joins
    needle = make_needle(haystack, length, depth, random.Random(length))
    assert len(needle.ids) == length - 12  # room for the answer, and no more
    text = tokenizer.decode(list(needle.ids))
    fact = FACT.format(key=needle.key, value=needle.value)
    begin, end = text.index("afterwards.\n") + len("afterwards.\n"), text.index("\nWhat is the special")
    body = text[begin:end]
    assert list(needle.ids) == encode_start(tokenizer, prompt_text(tokenizer, body, needle.key))
    before, after = (len(tokenizer(part).input_ids) for part in body.split(fact))
    sentence = max(len(piece.ids) for piece in haystack.pieces)
    assert abs(before / (before + after) - depth) * (before + after) <= sentence / 2 + 3
    assert abs(needle.placed_depth - before / (before + after)) < 0.02
    with pytest.raises(HyLoError, match="too short for the question itself: use"):
        make_needle(haystack, 60, depth, random.Random(0))


def test_tokenizer_that_merges_across_words(tokenizer, prose):
    """Such a one has whole prompts tokenised: joined ids would not be what the model was trained on."""
    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer, raw.decoder = pre_tokenizers.ByteLevel(False, use_regex=False), decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    raw.train_from_iterator([make_prose()], trainers.BpeTrainer(vocab_size=500, initial_alphabet=alphabet))
    crossing = PreTrainedTokenizerFast(tokenizer_object=raw)
    haystack = Prose(prose, crossing)
    assert not haystack.joins
    needle = make_needle(haystack, 500, 0.5, random.Random(1))
    assert 470 <= len(needle.ids) <= 488
    assert crossing(crossing.decode(list(needle.ids))).input_ids == list(needle.ids)


def test_batches_hold_one_length(tokenizer):
    lengths = [5, 7, 5, 5, 7, 5, 5]
    needles = [NeedlePrompt(10, 0.5, 0.5, "key", "1", tuple(range(n))) for n in lengths]
    model = Stub(tokenizer, None)
    assert list(batches(needles, model, 3)) == [[0, 2, 3], [5, 6], [1, 4]]
    assert [len(batch) for batch in batches([needles[0]] * 100, model, 15)] == [15] * 6 + [10]
    assert [len(batch) for batch in batches(needles * 200, model, None)] == [500, 500, 400]
    with pytest.raises(ValueError, match="expected one length"):
        greedy(model, [(1, 2), (1, 2, 3)], 4, bool)


def test_decoding_stops_when_every_number_is_over(tokenizer, prose):
    needles = make_needles(Prose(prose, tokenizer), (500,), 2, 2, seed=0)
    answers = {needle.key: f" {needle.value}. And so on" for needle in needles}
    answers[needles[1].key] = ""  # ends at once
    answers[needles[2].key] = " 12,345 and more"
    model = Stub(tokenizer, lambda text: answers[re.search(r"magic number for (\S+) mentioned", text).group(1)])
    found = answer_batch(model, tokenizer, needles)
    assert found[0] == f" {needles[0].value}." and found[1] == "" and found[3] == f" {needles[3].value}."
    assert first_number(found[2]) == "12345" and not found[2].endswith("more")
    longest = max(len(tokenizer(text).input_ids) for text in found)
    assert model.calls == [(4, 488), *[(4, 1)] * (longest - 1)]
    slow = Stub(tokenizer, lambda text: " no number at all, and no end of it, and no end of it, and no end of it")
    answer_batch(slow, tokenizer, needles)
    assert len(slow.calls) == 12


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


@pytest.mark.parametrize("kind", ["llama", "gdn", "mamba2"])
def test_greedy_equals_generate(tokenizer, prose, kind, monkeypatch):
    model = make_model(tokenizer, initializer_range=0.4) if kind == "llama" else random_hybrid(tokenizer, kind)
    model.generation_config.eos_token_id = None  # twelve tokens, whatever they are
    prompts = [needle.ids for needle in make_needles(Prose(prose, tokenizer), (450,), 2, 2, seed=3)]
    masks, attend = [], F.scaled_dot_product_attention

    def record(query, key, value, attn_mask=None, **kwargs):
        masks.append(attn_mask)
        return attend(query, key, value, attn_mask, **kwargs)

    monkeypatch.setattr(F, "scaled_dot_product_attention", record)
    found = greedy(model, prompts, 12, lambda ids: False)
    assert masks and all(mask is None for mask in masks)
    monkeypatch.undo()
    for prompt, answer in zip(prompts, found, strict=True):
        whole = model.generate(torch.tensor([prompt]), max_new_tokens=12, do_sample=False)
        assert whole[0, len(prompt) :].tolist() == answer
    assert len({tuple(answer) for answer in found}) > 1, "the prompts make no difference"


def test_long_documents(tokenizer, tmp_path):
    texts = [make_prose(seed, sentences) for seed, sentences in ((0, 60), (1, 3), (2, 50), (3, 2), (4, 70))]
    file = write_lines(tmp_path / "long.jsonl", [{"text": text} for text in texts])
    model = make_model(tokenizer)
    found = long_documents_of(model, tokenizer, file, context=600, count=2, chunk=64)
    losses = [naive_losses(model, tokenizer, file, 600)[i] for i in (0, 2)]
    assert found["documents"] == 2 and found["tokens"] == 2 * 599
    assert found["loss"] == pytest.approx(torch.cat(losses).mean().item(), rel=1e-4)
    assert [row["from"] for row in found["by_position"]] == [0, 128, 256, 512]
    assert long_documents_of(model, tokenizer, file, context=600, count=9)["documents"] == 3
    with pytest.raises(HyLoError, match="no document of 100,000 tokens"):
        long_documents_of(model, tokenizer, file, context=100_000)


def test_prompt_uses_the_chat_template(tokenizer):
    chat = prompt_text(tokenizer, "Text.", "old-key")
    assert chat.startswith("<|user|>Some special") and "provided text?<|assistant|>The special" in chat
    plain = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    assert prompt_text(plain, "Text.", "old-key").startswith("Some special")


def test_report_files(tmp_path, folder, prose):
    log = tmp_path / "train.jsonl"
    lines = [{"stage": stage, "iteration": i, "loss": 5 / i} for stage in ("ild", "kl") for i in range(1, 60)]
    write_lines(log, [{"event": "start"}, *lines])
    with log.open("a") as file:
        file.write('{"stage": "kl", "itera')  # stopped while writing
    settings = Settings(
        context=128, ppl_tokens=300, long_context=300, long_documents=2, needle_lengths=(450, 500), needle_samples=1,
        needle_depths=2, teacher_needle_limit=460,
    )  # fmt: skip
    out = tmp_path / "out"
    files = {"out_dir": out, "prose": prose, "code": prose, "c": prose, "long": prose, "curves": [log]}
    report = evaluate(folder, teacher_dir=folder, settings=settings, **files)
    assert json.loads((out / "evaluation.json").read_text()) == json.loads(json.dumps(report))
    assert report["model"]["name"] == "tiny" and report["model"]["kv_cache_bytes_per_token"] == 2 * (2 * 2 * 8 * 2)
    assert report["ratios"] == {
        "kv_cache": 1.0, "perplexity_prose": 1.0, "perplexity_code": 1.0, "perplexity_c": 1.0, "perplexity_long": 1.0
    }  # fmt: skip
    assert report["model"]["perplexity"]["prose"]["tokens"] == 300
    assert report["model"]["long"]["documents"] == 2 and report["model"]["long"]["tokens"] == 2 * 299
    assert [row["length"] for row in report["teacher"]["needle"]["by_length"]] == [450]
    assert report["teacher"]["needle"]["not_run"] == [500] and report["model"]["needle"]["not_run"] == []
    again = evaluate(
        folder, teacher_figures=report["teacher"], out_dir=tmp_path / "again", prose=prose, settings=settings
    )
    assert again["teacher"] == report["teacher"] and again["ratios"] == {"kv_cache": 1.0, "perplexity_prose": 1.0}
    for name in ("needle.png", "loss_by_position.png", "loss_curves.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    text = (out / "evaluation.md").read_text()
    assert "|  | teacher | model | ratio |" in text and "| perplexity, C |" in text
    assert "| needle, 450 tokens | 0 % (0/2; 0–66) | 0 % (0/2; 0–66) |" in text
    assert "| needle, 500 tokens | not run | 0 % (0/2; 0–66) |" in text
    assert "## Loss by position, long documents\n\nNats a token, 598 tokens of 2 documents." in text
    assert f"{report['model']['perplexity']['prose']['perplexity']:.3f}" in text
    assert not list(out.glob("*.partial*")) and str(tmp_path) not in text + (out / "evaluation.json").read_text()


def test_model_alone_without_needles(tmp_path, folder, prose):
    report = evaluate(folder, out_dir=tmp_path, prose=prose, settings=Settings(ppl_tokens=60, skip=("needle",)))
    assert "teacher" not in report and "needle" not in report["model"] and report["ratios"] == {}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "evaluation.json", "evaluation.md", "loss_by_position.png"
    ]  # fmt: skip


def test_cache_of_a_hybrid_counts_mla_rows():
    config = HyLoConfig(mixers=["gdn", "mla", "gdn", "gdn", "mla"], kv_lora_rank=256, qk_rope_head_dim=64)
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
        ("absent.jsonl: no such file", folder, {"prose": tmp_path / "absent.jsonl"}),
        ("bad.jsonl:2: expected a string under 'text'", folder, {"prose": bad_line}),
        ("training log .* not found", folder, {"out_dir": tmp_path / "out", "curves": [tmp_path / "absent.jsonl"]}),
        ("device 'abacus'", folder, {"settings": Settings(device="abacus")}),
        ("dtype 'int3'", folder, {"settings": Settings(dtype="int3")}),
    ):
        with pytest.raises(HyLoError, match=message):
            evaluate(model, **options)
    for wrong in (
        {"context": 0}, {"long_documents": 0}, {"needle_lengths": ()}, {"skip": ("all",)}, {"batch_size": 0},
        {"teacher_needle_limit": 512},
    ):  # fmt: skip
        with pytest.raises(HyLoError):
            Settings(**wrong)


def test_folder_that_does_not_fit(tmp_path, tokenizer):
    small, thin = tmp_path / "small", tmp_path / "thin"
    make_model(tokenizer, vocab_size=len(tokenizer) - 1).save_pretrained(small)
    make_model(tokenizer).save_pretrained(thin)
    config = json.loads((thin / "config.json").read_text())
    (thin / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    for path, message in ((small, "do not belong together"), (thin, "weights are missing")):
        with pytest.raises(HyLoError, match="has no tokenizer"):
            evaluate(path)
        tokenizer.save_pretrained(path)
        with pytest.raises(HyLoError, match=message):
            evaluate(path)


def test_tool_reports_a_bad_path_in_one_line(tmp_path):
    tool = ROOT / "tools" / "evaluate.py"
    command = [sys.executable, tool, "--model", tmp_path / "absent", "--out", tmp_path / "out", "--prose", "p.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 2 and re.fullmatch(r"error: model folder .* not found.*\n", done.stderr), done.stderr
