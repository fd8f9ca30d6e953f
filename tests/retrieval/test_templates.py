"""The wording of retrieval samples: apart from the evaluation's, and chat formats of all templates."""

import dataclasses
import random
import re
from collections import Counter

import pytest
from helpers.retrieval import SYLLABLES, TEMPLATE

from hylo_megatron.errors import HyLoError
from hylo_megatron.retrieval import haystack, templates
from hylo_megatron.retrieval.chat_format import PLAIN, ChatFormat


def runs_of_three(text: str) -> set[tuple[str, ...]]:
    """Of the words of a template, placeholders and punctuation removed."""
    words = re.sub(r"[^\w\s]", "", re.sub(r"\{\w*\}", " ", text.lower())).split()
    return set(zip(words, words[1:], words[2:], strict=False))


def test_the_wording_shares_no_run_of_three_words_with_the_evaluation():
    from hylo_megatron.evaluate import needle as evaluation

    theirs = set().union(*map(runs_of_three, (evaluation.FACT, evaluation.PROMPT, evaluation.ANSWER)))
    assert ("special", "magic", "number") in theirs and ("numbers", "for", "is") in theirs
    ours = [text for fact in templates.FACTS for text in dataclasses.astuple(fact) if isinstance(text, str)]
    ours += [fact.question + " " + fact.prefix + fact.suffix for fact in templates.FACTS]
    ours += [*templates.SYSTEMS, *templates.INTROS, *templates.INTROS_ASKING, *templates.CONTINUE]
    ours += [text for pair in templates.QUOTE for text in pair]
    for text in ours:
        assert not runs_of_three(text) & theirs, text
        assert "magic" not in text.lower()


def test_facts_can_be_filled_and_asked_for():
    assert len(templates.FACTS) >= 40 and len({fact.statement for fact in templates.FACTS}) == len(templates.FACTS)
    for fact in templates.FACTS:
        needle = fact.fill("KEY", "VALUE", bare=False)
        assert "KEY" in needle.statement and "VALUE" in needle.statement and "KEY" in needle.question
        assert "VALUE" not in needle.question + needle.prefix + needle.suffix
        assert "{" not in needle.question + needle.prefix and needle.prefix[-1:] in ("", " ")


def test_facts_of_a_group_differ_in_key_and_value_only():
    rng, taken, words = random.Random(0), set(), [a + b for a in SYLLABLES for b in SYLLABLES]
    shapes = Counter()
    for _ in range(300):
        before = set(taken)
        group = templates.fill_alike(4, words, taken, rng)
        keys = taken - before
        assert len(keys) == 4
        shapes.update(re.sub("[a-z]+", "a", re.sub("[A-Z]", "A", re.sub("[0-9]", "0", key))) for key in keys)
        assert len({needle.statement for needle in group}) == 4
        masked = set()
        for needle in group:
            (key,) = (key for key in sorted(keys, key=len) if key in needle.question)
            masked.add(needle.statement.replace(needle.value, "V", 1).replace(key, "K", 1))
            assert needle.value in needle.statement
        assert len(masked) == 1
    assert len(shapes) == len(templates.KEY_SHAPES) and min(shapes.values()) > 10


def test_values_are_mostly_numbers_of_three_to_eight_digits():
    rng, words = random.Random(0), ["silver", "window", "harbour"]
    values = [n.value for _ in range(400) for n in templates.fill_alike(2, words * 9, set(), rng)]
    numbers = [value for value in values if value.isdigit()]
    assert 0.6 < len(numbers) / len(values) < 0.9
    assert {len(value) for value in numbers} == set(range(3, 9))
    assert any("-" in value for value in values) and any(value in words for value in values)


def test_key_words_are_frequent_but_not_the_evaluations():
    texts = ["magic magical special number numbers the silver Silver silver-ish harbour harbour window2 can't"]
    assert haystack.rank_words(texts) == ["harbour", "silver"]
    common = [f"with{chr(97 + index // 26)}{chr(97 + index % 26)}" for index in range(200)]
    assert haystack.rank_words([" ".join(common * 2 + ["seldom"])])[-1] == "seldom"
    assert len(haystack.rank_words([" ".join(common * 2 + ["seldom"])])) == 201 - 50


def rendering(template: str):
    import jinja2

    def fail(message):
        raise ValueError(message)

    return lambda messages: jinja2.Template(template).render(messages=messages, raise_exception=fail)


def test_chat_formats_of_different_templates():
    chatml = ChatFormat.of(rendering(TEMPLATE))
    assert chatml.head == "<|im_start|>system\nBe yourself<|im_end|>\n<|im_start|>user\n"
    assert chatml.system == ("<|im_start|>system\n", "<|im_end|>\n<|im_start|>user\n")
    assert (chatml.ask, chatml.again, chatml.close) == (
        "<|im_end|>\n<|im_start|>assistant\n", "<|im_end|>\n<|im_start|>user\n", "<|im_end|>\n"
    )  # fmt: skip
    refusing = ChatFormat.of(rendering(
        "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system') }}{% endif %}"
        "{% if m.role == 'user' %}[INST] {{ m.content }}[/INST]{% else %} {{ m.content }}</s>{% endif %}{% endfor %}"
    ))  # fmt: skip
    assert refusing == ChatFormat("[INST] ", None, "[/INST] ", "</s>[INST] ", "</s>")
    thinking = ChatFormat.of(rendering(
        "{% for m in messages %}<{{ m.role }}>{% if loop.last %}<think></think>{% endif %}{{ m.content }}{% endfor %}"
    ))  # fmt: skip
    assert thinking.ask == "<assistant><think></think>"  # as the model is asked later on
    assert {ChatFormat.begin(PLAIN, random.Random(0))} == {""}
    with pytest.raises(HyLoError, match="does not render messages as they are"):
        ChatFormat.of(rendering("{{ messages[0].content }}"))
