"""Synthetic retrieval samples: exact lengths, answers in the text before them, and what is refused."""

import json
import random
import shutil

import numpy as np
import pytest
from helpers.retrieval import SYLLABLES, TEMPLATE

from hylo_megatron.data import prepare
from hylo_megatron.errors import HyLoError
from hylo_megatron.retrieval import make as retrieval
from hylo_megatron.retrieval import templates
from hylo_megatron.retrieval.samples import Row

LENGTH = 640


def prose(documents: int, rng: random.Random) -> list[str]:
    words = ["".join(rng.choices(SYLLABLES, k=rng.randint(2, 3))) for _ in range(300)]
    words += ["special", "numbers"]

    def sentence() -> str:
        return " ".join(rng.choices(words, k=rng.randint(4, 12))).capitalize() + rng.choice((".", ".", "?", ".\n\n"))

    return [" ".join(sentence() for _ in range(rng.randint(20, 120))) for _ in range(documents)]


@pytest.fixture(scope="module")
def work(tmp_path_factory):
    """Folders with a tokenizer (``hf``, and others by their chat templates), and a haystack (``hay``)."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    work = tmp_path_factory.mktemp("retrieval")
    texts = prose(150, random.Random(5))
    (work / "hay.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    wording = [text for fact in templates.FACTS for text in (fact.statement, fact.question)] * 3
    trainer = trainers.BpeTrainer(
        vocab_size=1500,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator([*texts[:40], *wording, *templates.INTROS], trainer)
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<|im_end|>"}
    several = [{"name": name, "template": TEMPLATE} for name in "ab"]
    chats = {"hf": TEMPLATE, "several": several, "broken": "{% for m in %}", "plain": None}
    for name, template in chats.items():
        (work / name).mkdir()
        tokenizer.save(str(work / name / "tokenizer.json"))
        (work / name / "tokenizer_config.json").write_text(
            json.dumps(config | ({"chat_template": template} if template else {}))
        )
    prepare.prepare([work / "hay.jsonl"], work / "hf", work / "hay")
    return work


@pytest.fixture(scope="module")
def tokenizer(work):
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(work / "hf" / "tokenizer.json"))


@pytest.fixture(scope="module")
def made(work):
    """Summary of a data set of 40 samples, its ids and its answers."""
    summary = retrieval.make_retrieval(work / "hay", work / "hf", work / "made", length=LENGTH, samples=40)
    ids = np.fromfile(work / "made.bin", summary["dtype"]).reshape(40, LENGTH)
    return summary, ids, np.load(work / "made.answers.npy", allow_pickle=False)


def recipe(work, **options):
    options = {"tokenizer_path": work / "hf", "length": LENGTH, "seed": 1, "chat_share": 0.0} | options
    return retrieval._open(work / "hay", **options)[0]


def answers_of(tokenizer, ids, answers) -> list[tuple[str, str]]:
    """For each run of marked tokens: the text before it, and the text of the run without the token that ends it."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], answers, [0]]).astype(np.int8))).reshape(-1, 2)
    decode = lambda part: tokenizer.decode(part.tolist(), skip_special_tokens=False)  # noqa: E731
    return [(decode(ids[:begin]), decode(ids[begin : end - 1])) for begin, end in edges]


def test_the_files_are_what_training_reads(work, made):
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    summary, ids, answers = made
    dataset = IndexedDataset(str(work / "made"))
    assert len(dataset) == 40 and all(np.array_equal(dataset[row], ids[row]) for row in range(40))
    assert dataset.index.dtype == np.uint16 and list(dataset.document_indices) == list(range(41))
    assert answers.shape == (40, LENGTH) and answers.dtype == np.uint8 and set(np.unique(answers)) == {0, 1}
    assert summary == json.loads((work / "made.json").read_text())
    assert (summary["kind"], summary["pack_length"], summary["sequences"]) == ("retrieval", LENGTH, 40)
    assert summary["answer_tokens"] == answers.sum() and summary["tokens"] == ids.size
    assert summary["chat_samples"] + summary["needle_samples"] == 40 and summary["chat_samples"] > 5
    assert not list(work.glob("*.partial*"))


def test_every_answer_stands_in_the_text_before_it(tokenizer, made):
    _, ids, answers = made
    found = [pair for row in range(40) for pair in answers_of(tokenizer, ids[row], answers[row])]
    assert len(found) > 60
    for before, answer in found:
        assert answer.strip() and answer.strip() in before


def test_no_sample_has_the_evaluations_words(tokenizer, made):
    _, ids, _ = made
    for row in ids:
        assert "magic" not in tokenizer.decode(row.tolist(), skip_special_tokens=False).lower()


def test_marked_tokens_are_the_value_and_the_token_that_ends_it(tokenizer):
    row = Row(tokenizer)
    row.write_answers(["Answer: The ticket is ", "silver door", ".\nQuestion: then\nAnswer: ", "4711", "\n"])
    ids, answers = np.concatenate(row.ids), np.concatenate(row.answers)
    assert [answer.strip() for _, answer in answers_of(tokenizer, ids, answers)] == ["silver door", "4711"]
    assert tokenizer.decode(ids[answers == 1].tolist()).replace(" ", "") == "silverdoor.4711\n"
    assert tokenizer.decode(ids.tolist()) == ("Answer: The ticket is silver door.\nQuestion: then\nAnswer: 4711\n")


@pytest.mark.parametrize("chat_share, kind", [(0.0, "needles"), (1.0, "chat")])
def test_shares_of_kinds_and_of_forms(work, tokenizer, chat_share, kind):
    samples = recipe(work, chat_share=chat_share)
    texts = []
    for index in range(120):
        sample = samples.make(index)
        assert sample.kind == kind and len(sample.ids) == len(sample.answers) == LENGTH
        texts.append(tokenizer.decode(sample.ids.tolist(), skip_special_tokens=False))
    chats = [text for text in texts if "<|im_start|>user" in text]
    if kind == "chat":
        assert len(chats) == 120 and sum("Answer:" in text for text in chats) == 0
        assert all(text.startswith("<|im_start|>system\n") for text in chats)
        quoted = [text for text in chats if any(question in text for question, _ in templates.QUOTE)]
        assert 30 < len(quoted) <= 120
        return
    assert 65 < len(chats) < 102  # 70 %
    assert all(text.endswith("<|im_end|>\n") for text in chats)
    plain = [text for text in texts if text not in chats]
    answers = [text.count("\nAnswer: ") for text in plain]
    assert set(answers) == {1, 2, 3, 4}
    # asked before the text, the first question is not among those after it
    asked_first = [count - text.count("\nQuestion: ") for count, text in zip(answers, plain, strict=True)]
    assert set(asked_first) == {0, 1} and sum(asked_first) < 0.3 * len(plain)


def test_facts_are_hidden_all_over_and_between_sentences(work, tokenizer):
    samples = recipe(work, length=4096)
    depths, counts = [], set()
    for index in range(40):
        needles = samples._needles(random.Random(index))
        counts.add(len(needles))
        hidden = [tokenizer.encode(f" {needle.statement}").ids for needle in needles]
        row = Row(tokenizer)
        text = samples.haystack.passage(2000, random.Random(index))
        samples._hide(row, text, hidden, random.Random(index))
        pieces = row.ids
        assert np.array_equal(np.concatenate(pieces[::2]), text)
        assert [piece.tolist() for piece in pieces[1::2]] == hidden
        at = np.cumsum([len(piece) for piece in pieces[:-1:2]])
        depths += (at / len(text)).tolist()
        assert all(tokenizer.decode(text[place - 3 : place].tolist()).rstrip()[-1] in ".?" for place in at)
    assert counts <= set(range(2, 17)) and max(counts) > 10
    histogram = np.histogram(depths, bins=5, range=(0, 1))[0]
    assert histogram.min() > 0.1 * histogram.sum()


def test_passages_are_contiguous_and_keep_to_a_document_if_they_can(work, tokenizer):
    hay = recipe(work).haystack
    stream = hay.read(0, hay.size).astype(np.int64)
    ends = np.flatnonzero(stream == hay.eod_id)
    newline = tokenizer.encode("\n").ids
    assert newline == [hay.kinds.newline] and len(ends) == 150
    joined, text = 0, np.where(stream == hay.eod_id, newline[0], stream).tobytes()
    for seed in range(40):
        start, odd = divmod(text.find(hay.passage(600, random.Random(seed)).astype(np.int64).tobytes()), 8)
        assert start >= 0 and not odd
        joined += bool(((ends >= start) & (ends < start + 600)).any())
        inside = hay.passage(100, random.Random(seed), attempts=50)
        assert inside.astype(np.int64).tobytes() in stream.tobytes()
        assert start == 0 or stream[start - 1] == hay.eod_id or hay.kinds.ends_sentence[stream[start - 1]]
    assert 5 < joined < 40


def test_sentences_do_not_end_inside_numbers_and_names(work, tokenizer):
    hay = recipe(work).haystack
    text = "It is 3.14 in os.path now. The end! Or not?\n\nYes"
    ids = np.array(tokenizer.encode(text).ids)
    ends = [tokenizer.decode(ids[:place].tolist()) for place in hay.sentence_ends(ids)]
    assert ends == ["It is 3.14 in os.path now.", "It is 3.14 in os.path now. The end!", text[: text.index("\n")]]


def test_workers_and_the_number_of_samples_do_not_change_a_sample(work, made):
    _, ids, answers = made
    summary = retrieval.make_retrieval(
        work / "hay", work / "hf", work / "parallel", length=LENGTH, samples=20, workers=2
    )
    assert np.array_equal(np.fromfile(work / "parallel.bin", summary["dtype"]).reshape(20, LENGTH), ids[:20])
    assert np.array_equal(np.load(work / "parallel.answers.npy"), answers[:20])
    other = recipe(work, seed=2, chat_share=0.4)
    assert not any(np.array_equal(other.make(index).ids, ids[index]) for index in range(5))


def test_without_a_chat_template_everything_is_plain(work, tokenizer, capsys):
    summary = retrieval.make_retrieval(work / "hay", work / "plain", work / "plainly", length=LENGTH, samples=8)
    assert (summary["chat_samples"], summary["needle_samples"], summary["chat_share"]) == (0, 8, 0.0)
    for ids in np.fromfile(work / "plainly.bin", summary["dtype"]).reshape(8, LENGTH):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False)
        assert "Question: " in text and "\nAnswer: " in text and "<|im_start|>" not in text
    argv = ["--haystack", work / "hay", "--tokenizer", work / "plain", "--out", work / "plainly", "--length", LENGTH]
    retrieval.main([*map(str, argv), "--samples", "2"])
    assert "plain has no chat template, so there are no chats" in capsys.readouterr().out


@pytest.mark.parametrize(
    "options, change, message",
    [
        ({"length": 100}, {}, "--length 100: expected at least 512"),
        ({"samples": 0}, {}, "--samples 0.*expected 1 or more"),
        ({"chat_share": 1.5}, {}, "--chat-share 1.5: expected a share from 0 to 1"),
        ({"length": 10**6}, {}, r"bad.bin: \d+ tokens of text, too few for samples of --length 1000000"),
        ({}, {"pack_length": 64}, "bad.bin holds packed sequences.*without --pack-length"),
        ({}, {"vocab_size": 9}, "made with a tokenizer of 9 tokens, this one has"),
        ({}, {"tokens": 5000}, "bad.bin: expected 5000 tokens as .*bad.json says"),
        ({}, {"dtype": None}, "bad.json: no dtype"),
        ({}, None, "bad.json: not valid JSON"),
        ({"haystack": "gone"}, {}, "gone.bin, gone.json: no such files.*hylo prepare-data"),
        ({"tokenizer": "hay.jsonl"}, {}, "hay.jsonl: expected a folder with tokenizer.json"),
        ({"tokenizer": "plain", "chat_share": 0.4}, {}, "plain: has no chat template, which --chat-share 0.4 needs"),
        ({"tokenizer": "several"}, {}, "several: has the chat templates a, b and none is the default"),
        ({"tokenizer": "broken"}, {}, "broken: the chat template does not render messages as they are"),
    ],
)
def test_bad_input_is_named_and_nothing_is_left(work, tmp_path, options, change, message):
    values = json.loads((work / "hay.json").read_text()) | (change or {})
    values = {key: value for key, value in values.items() if key != "dtype" or value}
    bad, out = tmp_path / "bad", tmp_path / "out"
    bad.mkdir()
    (bad / "bad.json").write_text("{" if change is None else json.dumps(values))
    shutil.copy(work / "hay.bin", bad / "bad.bin")
    given = {"haystack": bad / "bad", "tokenizer": "hf", "length": LENGTH, "samples": 2} | options
    paths = {key: work / given.pop(key) for key in ("haystack", "tokenizer")}  # an absolute path stays as it is
    with pytest.raises(HyLoError, match=message) as caught:
        retrieval.make_retrieval(out=out, **paths, **given)
    assert "\n" not in str(caught.value) and [path.name for path in tmp_path.iterdir()] == ["bad"]


def test_the_haystack_is_not_replaced(work):
    before = (work / "hay.bin").read_bytes()
    with pytest.raises(HyLoError, match="hay: is the haystack, which it would replace"):
        retrieval.make_retrieval(work / "hay", work / "hf", work / "hf" / ".." / "hay", length=LENGTH, samples=1)
    assert (work / "hay.bin").read_bytes() == before


def test_command_line(work, tmp_path, capsys):
    arguments = [
        "--haystack",
        str(work / "hay"),
        "--tokenizer",
        str(work / "hf"),
        "--out",
        str(tmp_path / "new" / "x"),
    ]
    retrieval.main([*arguments, "--length", "512", "--samples", "3", "--chat-share", "0"])
    assert "0 chats and 3 samples with hidden facts" in capsys.readouterr().out
    names = sorted(path.name for path in (tmp_path / "new").iterdir())
    assert names == ["x.answers.npy", "x.bin", "x.idx", "x.json"]
    with pytest.raises(SystemExit) as caught:
        retrieval.main([*arguments, "--length", "5", "--samples", "3"])
    assert caught.value.code == 2 and "--length 5" in capsys.readouterr().err
