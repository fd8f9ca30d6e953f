"""Short generated answers, scored by exact match after the usual normalisation."""

import re
import string
from dataclasses import dataclass

from hylo_megatron.evaluate.questions import Short, check_prompts, prompt_ids, prompt_text
from hylo_megatron.evaluate.task import Prompt, Task

INSTRUCTION = "Answer with a few words only, without a sentence."
ARTICLES = re.compile(r"\b(?:a|an|the)\b")
PUNCTUATION = str.maketrans("", "", string.punctuation + "‘’“”–—…")


def normalised(text: str) -> str:
    """Return a text in lower case without punctuation, articles and surplus spaces, as SQuAD's script does."""
    return " ".join(ARTICLES.sub(" ", text.lower().translate(PUNCTUATION)).split())


def comparable(text: str) -> str:
    """Return the normalised text. A text such as "A" or "+" keeps its articles or punctuation, so it is not empty."""
    lower = " ".join(text.lower().split())
    return normalised(text) or lower.translate(PUNCTUATION).strip() or lower


@dataclass(frozen=True, kw_only=True)
class Answers(Task):
    """Answer in a few words, after ``examples``. The answer's first line has to match one of the references."""

    name: str = "answers"
    max_new_tokens: int = 24
    questions: tuple[Short, ...]
    examples: tuple[Short, ...] = ()

    def prompts(self, tokenizer, length: int, samples: int, seed: int) -> list[Prompt]:
        """Return the prompts of the first ``samples`` questions."""
        room = length - self.max_new_tokens
        return [
            Prompt(
                ids=prompt_ids(tokenizer, self._text(short), short.where, room),
                length=length,
                references=short.answers,
            )
            for short in self.questions[:samples]
        ]

    def check(self, tokenizer, length: int, samples: int, seed: int) -> None:
        texts = ((self._text(short), short.where) for short in self.questions[:samples])
        check_prompts(tokenizer, texts, length - self.max_new_tokens)

    def _text(self, short: Short) -> str:
        examples = [(example.question, example.answers[0]) for example in self.examples]
        return prompt_text(INSTRUCTION, examples, short.question)

    def score(self, answer: str, prompt: Prompt) -> float:
        first = next(iter(answer.strip().splitlines()), "")
        return float(comparable(first) in {comparable(reference) for reference in prompt.references})

    def finished(self, text: str) -> bool:
        return "\n" in text.lstrip()
