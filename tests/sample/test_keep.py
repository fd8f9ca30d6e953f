"""Which sampled texts are kept."""

import random

from hylo_megatron.sample.keep import Keeper, Rules, looping, words

VOCABULARY = [f"word{number}" for number in range(500)]


def prose(seed: int, length: int = 300) -> list[str]:
    return random.Random(seed).choices(VOCABULARY, k=length)


def test_loops_are_found_and_prose_is_not():
    assert not looping(prose(1), 0.5)
    assert looping(["the", "same", "few", "words"] * 60, 0.5)
    assert looping(prose(2) + ["again", "and"] * 150, 0.5)  # a loop at the end of a good text
    refrain = prose(3, 30)
    assert not looping(prose(4, 120) + refrain + prose(5, 120) + refrain, 0.5)


def test_copies_and_near_copies_are_dropped():
    keeper = Keeper(Rules(shortest=20))
    first = prose(1)
    assert keeper.refusal(" ".join(first)) is None
    assert keeper.refusal("  ".join(first).upper()) == "copies"
    changed = list(first)
    changed[100], changed[200] = "other", "others"
    assert keeper.refusal(" ".join(changed)) == "near_copies"
    half = first[:150] + prose(9, 150)
    assert keeper.refusal(" ".join(half)) is None
    assert keeper.refusal("only a few words") == "short"
    assert all(keeper.refusal(" ".join(prose(seed))) is None for seed in range(20, 60))


def test_the_same_answer_to_another_question_is_kept():
    keeper = Keeper(Rules(shortest=1))
    assert keeper.refusal("Paris.", "What is the capital of France?\nParis.") is None
    assert keeper.refusal("Paris.", "Where does the Seine flow through?\nParis.") is None
    assert keeper.refusal("Paris.", "What is the capital of France?\nParis.") == "copies"


def test_words_of_other_scripts():
    assert words("Größe: 3 m²!") == ["größe", ":", "3", "m²", "!"]
