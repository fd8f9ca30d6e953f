"""Needle retrieval: hide one fact in prose, ask for it at the end, decode freely, and score the number in the
answer.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.prompts import MAX_NEW_TOKENS, NeedlePrompt, make_needles, prose_of
from hylo_megatron.evaluate.run_task import answerer, run
from hylo_megatron.evaluate.task import Prompt, Task

NUMBER = re.compile(r"\d{1,3}(?:,\d{3})+|\d+")
NUMBER_IS_OVER = re.compile(r"\d(?:[^\d,]|,\D)")


def first_number(text: str) -> str:
    """Return the first run of digits without thousands separators; empty if there is none."""
    found = NUMBER.search(text)
    return found.group().replace(",", "") if found else ""


@dataclass(frozen=True, kw_only=True)
class Needle(Task):
    """Retrieve a number of seven digits from ``depths`` places of a prose file; ``samples`` are those of a depth."""

    name: str = "needle"
    max_new_tokens: int = MAX_NEW_TOKENS
    file: Path
    depths: int = 5

    def prompts(self, tokenizer, length: int, samples: int, seed: int) -> list[NeedlePrompt]:
        return make_needles(prose_of(self.file, tokenizer), length, self.depths, samples, seed)

    def score(self, answer: str, prompt: Prompt) -> float:
        return float(first_number(answer) == prompt.references[0])

    def finished(self, text: str) -> bool:
        return bool(NUMBER_IS_OVER.search(text))


def needles_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    lengths: Iterable[int] = (1024, 2048),
    depths: int = 5,
    samples: int = 4,
    seed: int = 0,
    batch_size: int | None = None,
    label: str = "",
    chunk: int | None = None,
) -> dict:
    """Measure retrieval over depth x length with ``samples`` prompts per cell. Returns what ``tasks.run`` returns."""
    if depths < 1 or samples < 1:
        raise HyLoError(f"{depths} depths and {samples} samples of needles: expected at least 1 of each")
    task = Needle(file=Path(file), depths=depths)
    answer = answerer(model, tokenizer, task, batch_size, chunk)
    return run(task, tokenizer, answer, lengths=lengths, samples=samples, seed=seed, label=label)
