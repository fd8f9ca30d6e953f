"""A made world of towns and people: documents and questions for qa_1 and qa_2 where SQuAD and HotpotQA are missing.

All made names have seven letters, and none is used twice. No name is a part of another one, so an answer stands only
in the documents of its question.
"""

import random
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

from hylo_megatron.evaluate.ruler.questions import Library, Question

SYLLABLES = [consonant + vowel for consonant in "bdfgklmnprstvz" for vowel in "aeiou"]
ENDINGS = "lnrs"
HOUSEHOLDS = 4000  # each is a person and the town where the person was born
GIVEN = ("Ada", "Bruno", "Clara", "Dora", "Emil", "Fritz", "Greta", "Hugo", "Ida", "Jonas", "Karla", "Lena")
TRADES = ("painter", "baker", "sailor", "teacher", "clockmaker", "botanist", "printer", "singer")
GOODS = ("glass", "paper", "cheese", "rope", "bells", "candles", "boats", "carpets")


def made_words() -> Iterator[str]:
    """Yield different words of seven letters, the same ones in each call."""
    rng, seen = random.Random("made words"), set()
    while True:
        word = "".join(rng.choices(SYLLABLES, k=3)) + rng.choice(ENDINGS)
        if word not in seen:
            seen.add(word)
            yield word


@lru_cache(maxsize=1)
def first_words(count: int) -> list[str]:
    return list(islice(made_words(), count))


def made_library(hops: int) -> Library:
    """Return the world with questions that need one document, or two (``hops``)."""
    rng, names = random.Random("made world"), (word.capitalize() for word in made_words())
    documents, questions = [], []
    for number in range(HOUSEHOLDS):
        person, founder, mayor = (f"{rng.choice(GIVEN)} {next(names)}" for _ in range(3))
        town, river, school = (next(names) for _ in range(3))
        trade = rng.choice(TRADES)
        documents += [
            f"{person}\n{person} is a {trade} who was born in {town} in {rng.randint(1801, 1980)} and went to the"
            f" {school} School.",
            f"{town}\n{town} is a town on the river {river}. It was founded by {founder} in {rng.randint(1101, 1800)}"
            f" and is known for its {rng.choice(GOODS)}. Its mayor is {mayor}.",
        ]
        one_hop = [
            (f"Who is the mayor of {town}?", mayor, 1),
            (f"Who founded the town of {town}?", founder, 1),
            (f"To which school did {person} go?", school, 0),
        ]
        two_hops = [
            (f"Which river flows through the town where the {trade} {person} was born?", river),
            (f"Who founded the town in which {person} was born?", founder),
            (f"Who is the mayor of the town in which {person} was born?", mayor),
        ]
        own, kind = (2 * number, 2 * number + 1), rng.randrange(3)
        if hops == 1:
            text, answer, needed = one_hop[kind]
            questions.append(Question(text=text, answers=(answer,), own=own[needed : needed + 1]))
        else:
            text, answer = two_hops[kind]
            questions.append(Question(text=text, answers=(answer,), own=own))
    return Library(documents, questions)
