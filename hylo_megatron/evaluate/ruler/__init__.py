"""RULER (arXiv 2404.06654): its 13 tasks in their standard configuration and scoring, from texts on this machine.

The wording of the prompts, the noise sentences and the word lists are this project's own.
"""

from functools import lru_cache
from pathlib import Path

from hylo_megatron.evaluate.ruler.base import RulerTask
from hylo_megatron.evaluate.ruler.counting import CommonWords, FrequentWords
from hylo_megatron.evaluate.ruler.niah import niah_tasks
from hylo_megatron.evaluate.ruler.qa import Documents
from hylo_megatron.evaluate.ruler.sources import Sources
from hylo_megatron.evaluate.ruler.tracking import Tracking

__all__ = ["tasks"]


@lru_cache(maxsize=1)
def tasks(
    prose: Path, squad: Path | None = None, hotpot: Path | None = None, form: str | None = None
) -> tuple[RulerTask, ...]:
    """Return the 13 tasks in RULER's order.

    ``prose``: text file of the haystacks and words, ``form`` its format; None: as its contents say.
    ``squad`` and ``hotpot``: files of questions for qa_1 and qa_2; without them the questions are made, and their
    scores are not comparable with published ones.
    """
    sources = Sources(prose=prose, squad=squad, hotpot=hotpot, form=form)
    return (
        *niah_tasks(sources),
        Tracking(sources=sources),
        CommonWords(sources=sources),
        FrequentWords(sources=sources),
        Documents(name="qa_1", sources=sources),
        Documents(name="qa_2", sources=sources, hops=2),
    )
