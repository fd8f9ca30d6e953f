"""Every judge scores a perfect oracle 100 and a blind guesser at chance; question files; differences."""

import random
import re
from string import ascii_uppercase

import pytest
import torch
from helpers.evaluation import Stub, make_model, write_lines

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import choice
from hylo_megatron.evaluate.answers import Answers
from hylo_megatron.evaluate.compare import differences
from hylo_megatron.evaluate.needle import Needle
from hylo_megatron.evaluate.questions import draw, read_answers, read_choices
from hylo_megatron.evaluate.run_task import answerer, run
from hylo_megatron.evaluate.settings import SUITES
from hylo_megatron.evaluate.suites import REGISTRY

CHOICES = [
    {"question": f"What is {n} plus {n}?", "options": [str(2 * n + d) for d in range(4)], "answer": str(2 * n)}
    for n in range(150)
]
SHORT = [{"question": f"How many is {n}?", "answers": [f"number {n}", f"{n}"]} for n in range(40)]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    folder = tmp_path_factory.mktemp("questions")
    return write_lines(folder / "sums.jsonl", CHOICES), write_lines(folder / "numbers.jsonl", SHORT)


def oracle(prompts):
    return ((index, f" {prompt.references[0]}.\nMore") for index, prompt in enumerate(prompts))


def test_the_registry_has_the_suites_of_the_settings():
    assert tuple(REGISTRY) == SUITES


@pytest.mark.parametrize("name", ["needle", "letters", "answers"])
def test_an_oracle_scores_100_and_a_blind_guesser_chance(tokenizer, prose, files, name):
    rng = random.Random(1)
    task, length, samples, guess = {
        "needle": (Needle(file=prose, depths=3), 500, 10, lambda _: str(rng.randint(1_000_000, 9_999_999))),
        "letters": (
            choice.Letters(name="letters", chance=0.25, questions=read_choices(files[0])),
            300,
            150,
            lambda prompt: rng.choice(ascii_uppercase[: len(prompt.options)]),
        ),
        "answers": (Answers(questions=read_answers(files[1])), 300, 40, lambda _: rng.choice(["dog", "red"])),
    }[name]
    found = run(task, tokenizer, oracle, lengths=(length,), samples=samples)
    assert found["accuracy"] == 1 and found["low"] < 1 == pytest.approx(found["high"])

    def blind(prompts):
        return ((index, f" {guess(prompt)}\n") for index, prompt in enumerate(prompts))

    found = run(task, tokenizer, blind, lengths=(length,), samples=samples)
    assert found["chance"] == task.chance and found["low"] <= task.chance <= found["high"]
    wrong = run(task, tokenizer, lambda prompts: ((i, "") for i in range(len(prompts))), lengths=(length,), samples=2)
    assert wrong["accuracy"] == 0


@pytest.mark.parametrize("letter", "ABCD")
def test_a_preference_for_a_letter_scores_exactly_at_chance(tokenizer, files, letter):
    questions = read_choices(files[0])[:9]
    task = choice.Letters(name="letters", questions=questions)
    found = choice.by_letter(task, tokenizer, lambda ps: ((i, f" {letter}.") for i in range(len(ps))), 300)
    assert found["accuracy"] == choice.chance(questions) == 0.25 and found["low"] == found["high"] == 0.25
    assert found["samples"] == 9 and len(found["samples_of_shifts"]) == 36


def test_letters_and_answers_of_a_model(tokenizer, files):
    """The way through batches, decoding and stopping, with a model that knows everything."""
    questions, short = read_choices(files[0]), read_answers(files[1])

    def answer_of(text):
        lines = text.removesuffix("<|assistant|>Answer:").rsplit("Question: ", 1)[1].splitlines()
        right = sum(int(word) for word in lines[0].rstrip("?").split() if word.isdigit())
        return next(f" {line[0]}. That" for line in lines if line.endswith(f". {right}"))

    model = Stub(tokenizer, answer_of)
    task = choice.Letters(name="letters", questions=questions[:5], examples=questions[9:11])
    found = choice.by_letter(task, tokenizer, answerer(model, tokenizer, task), 900)
    assert found["accuracy"] == 1 and found["hits"] == found["samples"] == 5
    number = re.compile(r"(\d+)\?<\|assistant\|>Answer:$")
    know = Stub(tokenizer, lambda text: f" The number {number.search(text).group(1)}!\nAnd so on")
    task = Answers(questions=short[:7], examples=short[20:22])
    answered = run(task, tokenizer, answerer(know, tokenizer, task), lengths=(900,), samples=7)
    assert answered["accuracy"] == 1
    assert all("And" not in sample["answer"] for sample in answered["samples"])  # stopped after the first line


def test_likelihood_of_an_oracle_and_of_chance(tokenizer, files):
    questions = read_choices(files[0])

    def rate(right):
        """Return a scorer that gives ``right(question, option)`` to each candidate."""
        flat = [right(question, index) for question in questions for index in range(len(question.options))]
        return lambda candidates: flat

    found = choice.by_likelihood(tokenizer, questions, rate(lambda question, index: -float(index != question.answer)))
    assert found["sum"]["accuracy"] == found["normalised"]["accuracy"] == 1
    found = choice.by_likelihood(tokenizer, questions, rate(lambda *_: 0.0))  # all options are equal
    assert found["sum"]["accuracy"] == pytest.approx(0.25)
    rng = random.Random(0)
    found = choice.by_likelihood(tokenizer, questions, rate(lambda *_: -rng.random()))
    assert found["sum"]["low"] < 0.25 < found["sum"]["high"]


def test_likelihood_is_that_of_the_options_tokens(tokenizer, files):
    model = make_model(tokenizer)
    question = read_choices(files[0])[0]
    options = choice.candidates(tokenizer, question)
    for candidate, option in zip(options, question.options, strict=True):
        assert tokenizer.decode(candidate.ids[candidate.start :]) == f" {option}"
    together = choice.scorer(model, batch_size=4)(options)
    for candidate, found in zip(options, together, strict=True):
        ids = torch.tensor([candidate.ids])
        with torch.no_grad():
            logs = model(ids).logits[0].log_softmax(-1)
        parts = [logs[at - 1, candidate.ids[at]].item() for at in range(candidate.start, len(candidate.ids))]
        assert found == pytest.approx(sum(parts), rel=1e-4)


def test_decoding_goes_on_to_the_end_of_a_written_option(tokenizer, tmp_path):
    """A capital before a space or a point ends nothing; a further line ends the answer."""
    row = {"question": "What copies DNA?", "options": ["DNA polymerase", "The U.S. Army", "water"], "answer": 0}
    task = choice.Letters(name="letters", questions=read_choices(write_lines(tmp_path / "dna.jsonl", [row])))

    def written(answer: str) -> dict:
        model = Stub(
            tokenizer, lambda text: answer + re.search(r"(.)\. DNA polymerase", text).group(1) + "\n\nQ: x y z"
        )
        return choice.by_letter(task, tokenizer, answerer(model, tokenizer, task), 900)

    for answer in ("DNA polymerase\n", "I think: the answer is ", "", "The answer is:\n"):
        found = written(answer)
        assert found["accuracy"] == 1, answer
        assert not any("x y" in sample["answer"] for sample in found["samples_of_shifts"])
    assert written("DNA\n")["accuracy"] == written("The U.S. Army\n")["accuracy"] == 0


def test_the_first_option_scores_exactly_at_chance(tokenizer, files):
    task = choice.Letters(name="letters", questions=read_choices(files[0])[10:20])
    found = choice.by_letter(task, tokenizer, lambda ps: ((i, f" {p.options[0]}") for i, p in enumerate(ps)), 300)
    assert found["accuracy"] == 0.25 and found["low"] == found["high"] == 0.25


def test_wrong_questions_are_refused_with_file_and_line(tmp_path):
    right = {"question": "?", "options": ["a", "b"], "answer": 1}
    for change, message in (
        ({"options": ["a"]}, "field options"),
        ({"options": ["a", "a"]}, "field options"),
        ({"options": ["a", " "]}, "field options"),
        ({"options": "ab"}, "field options"),
        ({"answer": 2}, "field answer is 2: expected one of the options"),
        ({"answer": -1}, "field answer"),
        ({"answer": "B"}, "field answer is 'B'"),
        ({"answer": True}, "field answer"),
        ({"question": " "}, "field question is empty"),
    ):
        file = write_lines(tmp_path / "bad.jsonl", [right, {**right, **change}])
        with pytest.raises(HyLoError, match=rf"bad\.jsonl:2: {message}"):
            read_choices(file)
    for row, message in (
        ({"question": "?"}, "field answers is missing"),
        ({"question": "?", "answers": []}, "answers"),
    ):
        file = write_lines(tmp_path / "short.jsonl", [row])
        with pytest.raises(HyLoError, match=rf"short\.jsonl:1: .*{message}"):
            read_answers(file)
    (tmp_path / "text.jsonl").write_text("no JSON\n")
    with pytest.raises(HyLoError, match=r"text\.jsonl:1: not valid JSON"):
        read_answers(tmp_path / "text.jsonl")
    (tmp_path / "text.jsonl").write_text("\n")
    with pytest.raises(HyLoError, match="has no questions"):
        read_choices(tmp_path / "text.jsonl")
    with pytest.raises(HyLoError, match="no such file"):
        read_choices(tmp_path / "absent.jsonl")


def test_a_question_that_does_not_fit_is_refused(tokenizer, tmp_path):
    file = write_lines(tmp_path / "long.jsonl", [SHORT[0], {"question": "very long " * 99, "answers": ["no"]}])
    task = Answers(questions=read_answers(file))
    with pytest.raises(HyLoError, match=r"long\.jsonl:2: the prompt has .* expected at most 276: raise --context or"):
        task.prompts(tokenizer, 300, 2, 0)


def test_drawn_questions_depend_on_the_seed_only(files):
    questions = read_choices(files[0])
    assert draw(questions, 3, 5, 1) == draw(questions, 3, 5, 1) != draw(questions, 3, 5, 2)
    examples, asked = draw(questions, 3, None, 0)
    assert len(examples) == 3 and len(asked) == 147 and not set(examples) & set(asked)
    assert draw(questions, 0, 999, 0) == ((), questions)
    with pytest.raises(HyLoError, match=r"sums\.jsonl:1: 150 questions, too few for --shots 150"):
        draw(questions, 150, None, 0)


def test_examples_stand_before_the_question(tokenizer, files):
    questions = read_choices(files[0])
    task = choice.Letters(name="letters", questions=questions[5:6], examples=questions[7:9])
    prompt = task.prompts(tokenizer, 900, 1, 0)[1]
    text = tokenizer.decode(list(prompt.ids))
    assert "Question: What is 7 plus 7?\nA. 14\nB. 15\nC. 16\nD. 17\nAnswer: A\n\n" in text
    assert "Question: What is 8 plus 8?\nA. 17\nB. 18\nC. 19\nD. 16\nAnswer: D\n\n" in text
    assert text.endswith("Question: What is 5 plus 5?\nA. 11\nB. 12\nC. 13\nD. 10<|assistant|>Answer:")
    assert prompt.references == ("D",)


def test_differences_of_every_suite_are_those_of_its_questions(tokenizer, prose, files):
    """Figures of an oracle and of one that misses every third question; rows and questions have the same labels."""

    def figures(answerer):
        needle = run(Needle(file=prose, depths=3), tokenizer, answerer, lengths=(500,), samples=4)
        questions = read_choices(files[0])[:6]
        likelihood = choice.by_likelihood(tokenizer, questions, lambda options: [float(-i % 4) for i in range(24)])
        letters = choice.by_letter(choice.Letters(name="letters", questions=questions), tokenizer, answerer, 300)
        task = Answers(questions=read_answers(files[1]))
        answers = {"numbers": run(task, tokenizer, answerer, lengths=(300,), samples=12)}
        tasks = {name: dict(needle) for name in ("niah_single_1", "vt")}
        return {
            "needle": needle, "answers": answers,
            "choice": {"sums": {"chance": 0.25, "likelihood": likelihood, "letters": letters}},
            "ruler": {"tasks": tasks, "by_length": [{**needle["by_length"][0], "samples": 24}]},
        }  # fmt: skip

    def poor(prompts):
        return ((i, "" if i % 3 == 0 else answer) for i, answer in oracle(prompts))

    base, model = figures(oracle), figures(poor)
    found = differences(base, model)
    likelihood = {label for label in found if "likelihood" in label}
    assert len(found) == 8 and len(likelihood) == 2
    for label, each in found.items():
        if label in likelihood:
            assert (each["difference"], each["better"], each["worse"]) == (0, 0, 0)
            assert "low" not in each or each["low"] == pytest.approx(-each["high"]) and each["low"] < 0
            continue
        assert each["difference"] == pytest.approx(-1 / 3) and each["low"] <= each["difference"] <= each["high"] <= 0.1
        questions = {"sums, written (chance 25 %)": 6, "RULER, mean of 2, 500 tokens": 24}.get(label, 12)
        assert (each["samples"], each["better"]) == (questions, 0) and each["worse"] >= questions / 3
        assert differences(model, base)[label]["low"] == pytest.approx(-each["high"])
    # another prompt at one place: the questions are not the same, and no interval is claimed
    model["needle"] = {**model["needle"], "samples": [dict(sample) for sample in model["needle"]["samples"]]}
    model["needle"]["samples"][5]["prompt_tokens"] += 1
    assert differences(base, model)["needle, 500 tokens"] == {"difference": pytest.approx(-1 / 3)}
    assert "low" in differences(base, model)["RULER vt, 500 tokens"]


def test_one_question_gives_no_interval(tokenizer, prose):
    one = {"needle": run(Needle(file=prose, depths=1), tokenizer, oracle, lengths=(500,), samples=1)}
    assert differences(one, one) == {"needle, 500 tokens": {"difference": 0.0}}
