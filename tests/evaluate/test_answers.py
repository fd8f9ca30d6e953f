"""Which written answers count as right."""

import pytest

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import choice
from hylo_megatron.evaluate.answers import Answers, normalised
from hylo_megatron.evaluate.questions import read_answers
from hylo_megatron.evaluate.task import Prompt


def test_letters_in_answers():
    for text, letter in (
        (" B", "B"), (" (C)", "C"), ("**D**", "D"), ("The answer is A.", "A"), (" Answer: B", "B"), ("A dog", "A"),
        (" the correct answer is D", "D"),
        ("Apple", ""), ("I think so", ""), ("E", ""), ("", ""), ("I. The answer is C", "C"),
    ):  # fmt: skip
        assert choice.first_letter(text, 4) == letter, text


def test_options_written_in_place_of_their_letters():
    options = ("New Delhi", "the Sun", "Mercury", "4")
    for text, letter in (
        (" new delhi.\nQuestion", "A"), ("The sun", "B"), ("B. the Sun", "B"), ("4", "D"), ("Mercury is", ""),
    ):  # fmt: skip
        assert choice.chosen(text, options) == letter, text
    numbers = ("-5", "3.5", "35", "A*")
    for text, letter in (("5", ""), ("-5.", "A"), ("35", "C"), ("3.5", "B"), ("A", "A"), ("A*.", "D")):
        assert choice.chosen(text, numbers) == letter, text
    assert choice.chosen("**New  Delhi.**", options) == choice.chosen("“new delhi”", options) == "A"
    assert choice.chosen("A cat", ("A dog", "A cat")) == "B" and choice.chosen("cat", ("A cat", "The cat")) == ""


def test_a_reference_that_is_an_article_or_a_sign_is_not_empty():
    task = Answers(questions=())
    for reference, right, wrong in (
        ("A", " a.\n", "the"),
        ("The", "the", "a"),
        ("+", "+", "-"),
        ("a, the", "A the", ""),
    ):
        prompt = Prompt(ids=(), length=1, references=(reference,))
        assert task.score(right, prompt) == 1 and task.score(wrong, prompt) == task.score(" \n", prompt) == 0, (
            reference
        )


def test_normalised_answers():
    assert normalised(" The  Eiffel-Tower, a tower. ") == "eiffeltower tower"
    assert normalised("“Paris”…") == "paris" and normalised("theatre") == "theatre"


def test_a_file_of_text_is_no_file_of_questions(tmp_path):
    file = tmp_path / "questions.txt"
    file.write_text("Who jumps?\n")
    with pytest.raises(
        HyLoError, match="questions.txt:1: not valid JSON .*; expected one question in JSON on each line"
    ):
        read_answers(file)
