"""RULER's 13 tasks: lengths, facts, scores, question files, and a model that answers all of them."""

import json
import re
from collections import Counter

import pytest
import torch
from helpers.ruler import KINDS, make_prose, tokenizer_of, wording
from transformers import LlamaConfig, LlamaForCausalLM

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import encoding
from hylo_megatron.evaluate.greedy import greedy
from hylo_megatron.evaluate.ruler import niah, tasks
from hylo_megatron.evaluate.ruler.questions import read_library
from hylo_megatron.evaluate.ruler.sources import Sources
from hylo_megatron.retrieval import templates

NAMES = [
    "niah_single_1", "niah_single_2", "niah_single_3", "niah_multikey_1", "niah_multikey_2", "niah_multikey_3",
    "niah_multivalue", "niah_multiquery", "vt", "cwe", "fwe", "qa_1", "qa_2",
]  # fmt: skip
NEW_TOKENS = {"vt": 30, "cwe": 120, "fwe": 50, "qa_1": 32, "qa_2": 32}  # the others: 128
ASKED = {"niah_multivalue": 4, "niah_multiquery": 4}
HIDDEN = ASKED | {"niah_multikey_1": 4}


@pytest.fixture(scope="module")
def prose(tmp_path_factory):
    path = tmp_path_factory.mktemp("ruler") / "prose.jsonl"
    path.write_text("".join(json.dumps({"text": make_prose(seed, 200)}) + "\n" for seed in range(4)))
    return path


@pytest.fixture(scope="module")
def all_tasks(prose):
    found = {task.name: task for task in tasks(prose)}
    assert list(found) == NAMES
    return found


def texts_of(task, kind: str, length: int, samples: int = 3, seed: int = 0) -> list[tuple[str, tuple[str, ...]]]:
    tokenizer = tokenizer_of(kind)
    prompts = task.prompts(tokenizer, length, samples, seed)
    return [(tokenizer.decode(prompt.ids), prompt.references) for prompt in prompts]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", NAMES)
def test_prompts_fill_the_length_and_are_the_ids_of_their_text(all_tasks, name, kind):
    task, tokenizer, length = all_tasks[name], tokenizer_of(kind), 2048
    assert task.max_new_tokens == NEW_TOKENS.get(name, 128)
    prompts = task.prompts(tokenizer, length, 3, 7)
    assert len({prompt.ids for prompt in prompts}) == len({prompt.references for prompt in prompts}) == 3
    assert prompts == task.prompts(tokenizer, length, 3, 7)
    assert prompts[0] != task.prompts(tokenizer, length, 1, 8)[0]
    for prompt in prompts:
        room = length - task.max_new_tokens - len(prompt.ids)
        assert prompt.length == length and 0 <= room <= (48 if kind == "merging" else 16)
        text = tokenizer.decode(prompt.ids, skip_special_tokens=False)
        text = text.removeprefix({"line_ends": "<s>", "merging": " "}.get(kind, ""))
        assert prompt.ids == tuple(tokenizer(text, add_special_tokens=kind == "line_ends").input_ids)
        assert "<unk>" not in text and ("<|user|>" in text) == ("<|assistant|>" in text) == (kind == "byte_level")


@pytest.mark.parametrize("length", [4096, 8192])
def test_coded_text_fills_the_length_although_tokens_reach_across_words(all_tasks, length):
    prompts = all_tasks["fwe"].prompts(tokenizer_of("merging"), length, 12, 0)
    assert max(length - NEW_TOKENS["fwe"] - len(prompt.ids) for prompt in prompts) <= 32


@pytest.mark.parametrize("name", NAMES)
def test_the_oracle_has_every_point_and_a_blind_guesser_none(all_tasks, name):
    task = all_tasks[name]
    prompts = task.prompts(tokenizer_of("byte_level"), 1536, 8, 0)
    assert [task.score(f"well: {', '.join(prompt.references).upper()}.", prompt) for prompt in prompts] == [1] * 8
    assert [task.score("I do not know the answer, 1234567.", prompt) for prompt in prompts] == [0] * 8
    others = [task.score(" ".join(prompts[at - 1].references), prompt) for at, prompt in enumerate(prompts)]
    assert sum(others) / len(others) < 0.2 and task.chance == 0
    first = prompts[0].references
    if len(first) > 1:
        assert task.score(first[0], prompts[0]) == pytest.approx(1 / len(first))


@pytest.mark.parametrize("name", NAMES[:8])
def test_needles_stand_in_the_text_as_often_as_they_should(all_tasks, name):
    for text, references in texts_of(all_tasks[name], "line_ends", 2048):
        assert len(references) == len(set(references)) == ASKED.get(name, 1)
        facts = re.findall(r"A secret \w+ belonging to (\S+) is (\S+)\.", text)
        assert {value: text.count(value) for value in references} == dict.fromkeys(references, 1)
        asked = [key for key, value in facts if value in references]
        assert len(set(asked)) == (1 if name == "niah_multivalue" else ASKED.get(name, 1))
        assert [key for key, _ in facts if key in asked] == asked
        question = text.rsplit("Which secret", 1)[1]
        assert all(question.count(key) == 2 for key in asked)
        if name in ("niah_multikey_2", "niah_multikey_3"):
            assert len(facts) > 20 and text.count("\n") == len(facts) + 2
        else:
            assert len(facts) == HIDDEN.get(name, 1)
        assert ("The road is dry." in text) == (name == "niah_single_1")
        uuids = name in ("niah_single_3", "niah_multikey_3")
        assert all(re.fullmatch(r"[0-9a-f-]{36}" if uuids else r"\d{7}", value) for value in references)


def test_the_chain_of_assignments_is_complete_and_in_order(all_tasks):
    for text, references in texts_of(all_tasks["vt"], "line_ends", 2048):
        found = re.findall(r"^VAR ([A-Z]+) = (?:VAR )?(\w+)$", text, re.M)
        example, chain = found[:5], found[5:]
        assert len(chain) == 5 and tuple(name for name, _ in chain) == references
        assert [source for _, source in chain[1:]] == list(references[:-1])
        value = chain[0][1]
        assert re.fullmatch(r"\d{5}", value) and text.count(value) == 3 and text.endswith(f"the value {value}:")
        assert " ".join(name for name, _ in example) in text and {len(name) for name, _ in example} == {3}


@pytest.mark.parametrize(("length", "often", "seldom"), [(2048, 6, 1), (4096, 30, 3)])
def test_common_words_are_counted(all_tasks, length, often, seldom):
    for text, references in texts_of(all_tasks["cwe"], "line_ends", length, 2):
        example, listed = (part.split("\nQuestion")[0] for part in text.split("frequent words in mind.\n")[1:])
        numbers, words = zip(*re.findall(r"(\d+)\. (\w+)", listed), strict=True)
        assert numbers == tuple(str(number + 1) for number in range(len(words)))
        counts = Counter(words)
        assert {word for word, count in counts.items() if count == often} == set(references)
        assert {count for word, count in counts.items() if word not in references} == {seldom}
        assert len(references) == 10 and not set(references) & set(re.findall(r"[a-z]+", example))


def test_coded_words_fall_off_with_their_rank(all_tasks):
    for text, references in texts_of(all_tasks["fwe"], "line_ends", 2048):
        body = text.split("in the text.\n")[1].split("\nQuestion")[0]
        dots, *ranked = Counter(body.split(" ")).most_common()
        assert dots[0] == "..." and tuple(word for word, _ in ranked[:3]) == references
        assert ranked[2][1] > ranked[3][1] and ranked[0][1] == pytest.approx(dots[1] / 4, abs=3)
        assert all(re.fullmatch("[a-z]{6}", word) for word, _ in ranked)


@pytest.mark.parametrize("name", ["qa_1", "qa_2"])
def test_answers_stand_in_one_document(all_tasks, name):
    for text, references in texts_of(all_tasks[name], "line_ends", 2048, 6):
        labels = re.findall(r"^Document (\d+):$", text, re.M)
        assert labels == [str(number + 1) for number in range(len(labels))] and len(labels) > 5
        (answer,) = references
        documents = re.split(r"^Document \d+:$", text, flags=re.M)[1:]
        assert sum(answer in document for document in documents) == 1
        assert len(set(documents)) == len(documents) and text.endswith("?\nAnswer:")


def test_the_tokenizer_decides_whether_texts_are_encoded_one_by_one(all_tasks):
    def joins(task, kind: str) -> bool:
        return task._joins(task.sources.encoder(tokenizer_of(kind), task.border), 2048, "seed")

    for kind in ("byte_level", "line_ends"):
        assert all(joins(task, kind) for task in all_tasks.values())
    assert not joins(all_tasks["niah_single_2"], "merging")


def test_prompts_of_256k_tokens(all_tasks):
    tokenizer, length = tokenizer_of("byte_level"), 262_144
    for name in ("niah_single_1", "niah_multiquery", "vt", "fwe"):
        (prompt,) = all_tasks[name].prompts(tokenizer, length, 1, 0)
        assert 0 <= length - all_tasks[name].max_new_tokens - len(prompt.ids) <= 2


@pytest.mark.parametrize("name", NAMES)
def test_a_length_without_room_is_refused(all_tasks, name):
    for refuse in (all_tasks[name].check, lambda *where: all_tasks[name].prompts(*where, 1, 0)):
        with pytest.raises(HyLoError, match=r"too short .* use \d+ or more|use a greater length"):
            refuse(tokenizer_of("byte_level"), 150)
    all_tasks[name].check(tokenizer_of("byte_level"), 1536)


def test_prose_that_cannot_be_used_is_refused(tmp_path):
    chat = tmp_path / "chat.jsonl"
    chat.write_text(json.dumps({"messages": [{"role": "user", "content": "Hello there."}]}) + "\n")
    with pytest.raises(HyLoError, match="conversations, expected prose"):
        Sources(prose=chat).sentences  # noqa: B018
    chat.write_text(json.dumps({"text": "x"}) + "\n")
    with pytest.raises(HyLoError, match="no sentences"):
        Sources(prose=chat).sentences  # noqa: B018


def paragraph(number: int) -> dict:
    asked = {"question": f"Who is {number}?", "answers": [{"text": f"Person {number}", "answer_start": 0}] * 2}
    return {"context": f"Number {number} is Person {number} of the list.", "qas": [{**asked, "is_impossible": False}]}


def test_squad_in_its_own_layout_and_as_rows(tmp_path):
    articles = [
        {"title": "a", "paragraphs": [paragraph(0), paragraph(1)]},
        {"title": "b", "paragraphs": [paragraph(2)]},
    ]
    articles[1]["paragraphs"][0]["qas"].append({"question": "None?", "answers": [], "is_impossible": True})
    own, rows = tmp_path / "squad.json", tmp_path / "rows.jsonl"
    own.write_text(json.dumps({"version": "v2.0", "data": articles}))
    flat = [
        {"title": "ab"[at // 2], "context": paragraph(at)["context"], "question": f"Who is {at}?", "id": str(at),
         "answers": {"text": [f"Person {at}"], "answer_start": [0]}}
        for at in range(3)
    ]  # fmt: skip
    rows.write_text("".join(json.dumps(row) + "\n" for row in flat))
    assert read_library(own) == read_library(rows)
    library = read_library(own)
    assert [question.answers for question in library.questions] == [(f"Person {at}",) for at in range(3)]
    assert [question.related for question in library.questions] == [(1,), (0,), ()]


def test_hotpot_and_its_prompts(tmp_path, prose):
    path = tmp_path / "hotpot.json"
    pairs = [[f"Title {at}", [f"Sentence one of {at}.", f" Sentence two of {at}."]] for at in range(12)]
    row = {
        "question": "Which?",
        "answer": "Sentence two of 3",
        "context": pairs[:10],
        "type": "bridge",
        "level": "hard",
    }
    path.write_text(json.dumps([row, row | {"context": pairs[2:]}]))
    task = {task.name: task for task in tasks(prose, hotpot=path)}["qa_2"]
    for text, references in texts_of(task, "line_ends", 2048, 2):
        assert references == ("Sentence two of 3",) and text.count("Sentence two of 3") == 1
        assert all(f"Title {at}\nSentence one of {at}. Sentence two" in text for at in range(2, 10))
    named = {"title": [pair[0] for pair in pairs], "sentences": [pair[1] for pair in pairs]}
    path.write_text(json.dumps(row | {"context": named}) + "\n")
    assert len(read_library(path).documents) == 12


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("just text", "expected one on each line|plain text"),
        ('{"text": "a"}\n', "field question is missing.*SQuAD"),
        ('{"question": "a", "answers": {"text": "b"}, "context": "c"}\n', r"rows.jsonl:1: field answers.*SQuAD"),
        ('{"question": "a", "answers": [], "context": "c"}\n', "no question with an answer"),
    ],
)
def test_a_file_of_another_layout_is_refused(tmp_path, content, message):
    path = tmp_path / "rows.jsonl"
    path.write_text(content)
    with pytest.raises(HyLoError, match=message):
        read_library(path)


def test_the_wording_shares_no_run_of_three_words_with_training_samples():
    def runs(text: str) -> set[tuple[str, ...]]:
        words = re.findall(r"[\w{}]+", text.lower())
        return {run for run in zip(words, words[1:], words[2:], strict=False)}

    assert len(wording()) >= 14
    theirs = set().union(*(runs(f"{fact.statement} {fact.question} {fact.prefix}") for fact in templates.FACTS))
    theirs |= set().union(*map(runs, (*templates.INTROS, *templates.INTROS_ASKING, *templates.CONTINUE)))
    found = set().union(*map(runs, wording())) & theirs
    assert not found


def test_texts_that_fit_exactly():
    encoder = encoding.Encoder(tokenizer_of("byte_level"), encoding.LINES)
    for budget in (0, 1, 40, 100):
        lines = niah.fill_with_noise(encoder, budget)
        assert budget - 2 <= sum(map(len, encoder.pieces(lines))) <= budget
    texts, spare = ["a\n"] * 4, ["stordewick gardeber\n", "mil\n"]
    before, after = (
        sum(map(len, encoder.pieces(rows))) for rows in (texts, encoding.stretched(encoder, texts, spare, 3))
    )
    assert before < after <= before + 3


@torch.inference_mode()
def test_a_tiny_model_answers_all_tasks(all_tasks):
    tokenizer = tokenizer_of("byte_level")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=2048, **sizes)).eval()
    for task in all_tasks.values():
        (prompt,) = task.prompts(tokenizer, 1536, 1, 0)
        (ids,) = greedy(model, [prompt.ids], task.max_new_tokens, lambda ids: False)
        assert len(ids) == task.max_new_tokens and task.score(tokenizer.decode(ids), prompt) < 0.5
