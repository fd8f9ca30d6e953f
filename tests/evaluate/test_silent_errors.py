"""Figures that would be wrong without a sign of it: they are refused, left out, or said to be less than was asked."""

import pytest
import torch
from helpers.evaluation import make_model, make_tokenizer, write_lines
from helpers.ruler import make_prose as ruler_prose
from tokenizers import processors

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import choice
from hylo_megatron.evaluate.compare import compared
from hylo_megatron.evaluate.encoding import encode_start
from hylo_megatron.evaluate.greedy import greedy
from hylo_megatron.evaluate.models import describe, load
from hylo_megatron.evaluate.perplexity import long_documents_of, perplexity_of
from hylo_megatron.evaluate.questions import Choice, Short, draw
from hylo_megatron.evaluate.ruler import tasks
from hylo_megatron.evaluate.runner import evaluate
from hylo_megatron.evaluate.settings import Settings
from hylo_megatron.evaluate.tables import score_cell

QUESTION = Choice(question="1 + 1?", options=("2", "3"), answer=0, where="a:1")


def test_an_end_token_that_the_tokenizer_adds_is_no_part_of_a_prompt():
    tokenizer = make_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<|user|> $A <|end|>", special_tokens=[("<|user|>", 1), ("<|end|>", 0)]
    )
    tokenizer.chat_template = None
    assert tokenizer("The river").input_ids[-1] == tokenizer.eos_token_id, "this tokenizer adds no end token"
    assert tokenizer.decode(encode_start(tokenizer, "The river")) == "<|user|>The river"
    assert encode_start(tokenizer, "The river<|end|>")[-1] == tokenizer.eos_token_id  # the text's own
    for candidate, option in zip(choice.candidates(tokenizer, QUESTION), QUESTION.options, strict=True):
        assert tokenizer.decode(candidate.ids[candidate.start :]) == f" {option}"


def test_broken_weights_and_changed_logits_are_refused(tokenizer):
    model = make_model(tokenizer)
    options = choice.candidates(tokenizer, QUESTION)
    assert greedy(model, [(5, 6, 7)], 2, lambda ids: False) and choice.scorer(model)(options)
    model.config.final_logit_softcapping = 30.0
    with pytest.raises(HyLoError, match="scales or caps its logits"):
        choice.scorer(model)(options)
    model.config.final_logit_softcapping = None
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("nan")
    with pytest.raises(HyLoError, match="logits are not finite"):
        greedy(model, [(5, 6, 7)], 2, lambda ids: False)
    with pytest.raises(HyLoError, match="likelihood of an option is not finite"):
        choice.scorer(model)(options)


def test_less_text_than_asked_for_is_said(tokenizer, tmp_path, capsys):
    model, file = make_model(tokenizer), write_lines(tmp_path / "two.jsonl", [{"text": ruler_prose(0, 9)}] * 2)
    perplexity_of(model, tokenizer, file, context=64, max_tokens=126)
    long_documents_of(model, tokenizer, file, context=64, count=2)
    assert capsys.readouterr().out == ""
    perplexity_of(model, tokenizer, file, context=64, max_tokens=127)
    long_documents_of(model, tokenizer, file, context=64, count=3)
    said = "two.jsonl: {} are scored, not {}: the file has no more\n"
    assert capsys.readouterr().out == said.format("126 tokens", 127) + said.format("2 documents of 64 tokens", 3)


def test_a_second_file_of_which_nothing_would_be_read_is_refused(folder, tmp_path):
    files = [write_lines(tmp_path / name, [{"text": ruler_prose(0, 9)}]) for name in ("one.jsonl", "two.jsonl")]
    with pytest.raises(HyLoError, match="--prose: 2 files, expected one: join them in one file"):
        evaluate(folder, prose=files)


def test_a_length_that_would_count_twice_is_refused():
    for name in ("needle_lengths", "ruler_lengths"):
        with pytest.raises(HyLoError, match=f"--{name.replace('_', '-')} .*: expected each length once"):
            Settings(**{name: (1024, 2048, 1024)})


@pytest.mark.parametrize("kind", [Choice, Short])
def test_a_question_that_is_shown_with_its_answer_is_not_asked(kind):
    answer = {"options": ("2", "3"), "answer": 0} if kind is Choice else {"answers": ("2",)}
    questions = tuple(kind(question=f"{n // 2}?", where=f"file:{n + 1}", **answer) for n in range(12))
    for seed in range(5):
        (example,), asked = draw(questions, 1, None, seed)
        assert len(asked) == 10 and example.question not in {each.question for each in asked}
        assert draw(questions, 1, 4, seed)[1] == tuple(sorted(draw(questions, 1, 4, seed)[1], key=questions.index))
        assert len(draw(questions, 1, 4, seed)[1]) == 4
    with pytest.raises(HyLoError, match="file:1: every question is an example of --shots 1"):
        draw(questions[:2], 1, None, 0)


def test_equal_scores_that_are_no_hits_have_no_interval():
    row = {"accuracy": 0.25, "hits": 2.25, "samples": 9, "low": 0.25, "high": 0.25}
    assert score_cell(row) == "25 % (2.25/9)" and score_cell({**row, "high": 0.5}) == "25 % (2.25/9; 25–50)"


def test_questions_without_other_documents_do_not_fill_a_prompt(tokenizer, prose, tmp_path):
    row = {"question": "Where?", "context": "It was here, in the castle.", "answers": {"text": ["castle"]}}
    other = {"question": "When?", "context": "It was then.", "answers": {"text": ["then"]}}
    for rows, fits in (([row, row | {"question": "In which house?"}], False), ([row, other], True)):
        squad = write_lines(tmp_path / f"{fits}.jsonl", rows)
        (task,) = (task for task in tasks(prose, squad=squad) if task.name == "qa_1")
        if fits:
            assert len(task.prompts(tokenizer, 1500, 1, 0)[0].ids) > 1400
            continue
        with pytest.raises(HyLoError, match="qa_1: its file has one question's documents only"):
            task.check(tokenizer, 1500)


def test_perplexities_of_two_tokenizers_of_one_size_are_not_compared(folder):
    figures = describe(load(folder, torch.device("cpu"), torch.float32))
    figures |= {"perplexity": {"prose": {"tokens": 100, "perplexity": 8.0}}}
    assert compared(figures, figures)["perplexity_prose"] == {"ratio": 1.0}
    assert "perplexity_prose" not in compared(figures | {"tokenizer": "another"}, figures)
    older = {name: value for name, value in figures.items() if name != "tokenizer"}
    assert compared(older, figures)["perplexity_prose"] == {"ratio": 1.0}
