"""Multiple choice: by the likelihood of each option, and by the letter or the option that a model writes.

For the written answer every question is asked once for each cyclic shift of its options, so the right option stands at
every letter once. A model that always writes the same letter, or always the first option, scores exactly at chance.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from string import ascii_uppercase

import torch

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.encoding import encode_open
from hylo_megatron.evaluate.greedy import batches
from hylo_megatron.evaluate.perplexity import padded, token_losses
from hylo_megatron.evaluate.questions import Choice, check_prompts, prompt_ids, prompt_text
from hylo_megatron.evaluate.run_task import Answerer, run, summary, tally
from hylo_megatron.evaluate.task import Prompt, Task

LETTER = re.compile(r"^\W*([A-Z])(?![\w'])|(?i:\b(?:answer|option)(?: is)?:?)\s*\W?([A-Z])(?![\w'])")
MARKS = ' *"“”'
INSTRUCTION = "Answer with the letter of the right option only."
LETTER_IS_OVER = re.compile(r"\n\s*\S+\s")  # the first line, and a word of the next: "The answer is:\nB"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Ids of a question with one option. The option's likelihood is that of the ids from ``start`` on."""

    ids: tuple[int, ...]
    start: int


Scorer = Callable[[list[Candidate]], list[float]]  # log-probability of each candidate's option


@dataclass(frozen=True, kw_only=True)
class LetterPrompt(Prompt):
    question: int
    options: tuple[str, ...]


def first_letter(text: str, options: int) -> str:
    """Return the letter of an option that an answer begins with or announces; empty if there is none."""
    for found in LETTER.finditer(text):
        letter = found.group(1) or found.group(2)
        if letter in ascii_uppercase[:options]:
            return letter
    return ""


def shifted_options(question: Choice, shift: int) -> tuple[str, ...]:
    """Return the options from number ``shift`` on, the first ones last."""
    count = len(question.options)
    return tuple(question.options[(index + shift) % count] for index in range(count))


def listed(question: Choice, shift: int) -> tuple[str, str]:
    """Return a question with its shifted options, and the letter of the right one."""
    count, shifted = len(question.options), shifted_options(question, shift)
    lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, shifted, strict=False)]
    return "\n".join([question.question, *lines]), ascii_uppercase[(question.answer - shift) % count]


def chosen(answer: str, options: tuple[str, ...]) -> str:
    """Return the letter of the option whose text is the answer's first line, otherwise the letter that it names.

    Small models often write the option itself, some in quotes or asterisks. Signs count, since "-5" is not "5". An
    option that is a single letter can only be named.
    """
    line = next(iter(answer.strip().splitlines()), "")
    written = {_plain(line), _plain(line.strip(MARKS))} - {""}
    texts = [_plain(option) if len(option) > 1 or not option.isalpha() else "" for option in options]
    same = [at for at, text in enumerate(texts) if text in written]
    return ascii_uppercase[same[0]] if len(same) == 1 else first_letter(answer, len(options))


def _plain(text: str) -> str:
    """Return a text without upper case, surplus spaces and the point at its end."""
    return " ".join(text.casefold().split()).rstrip(". ")


@dataclass(frozen=True, kw_only=True)
class Letters(Task):
    """Name the letter of the right option, for every cyclic shift of the options, after ``examples``."""

    max_new_tokens: int = 24
    questions: tuple[Choice, ...]
    examples: tuple[Choice, ...] = ()

    def prompts(self, tokenizer, length: int, samples: int, seed: int) -> list[LetterPrompt]:
        """Return the prompts of the first ``samples`` questions."""
        return [
            self._prompt(tokenizer, length, number, shift)
            for number, question in enumerate(self.questions[:samples])
            for shift in range(len(question.options))
        ]

    def check(self, tokenizer, length: int, samples: int, seed: int) -> None:
        asked = ((question, shift) for question in self.questions[:samples] for shift in range(len(question.options)))
        texts = ((self._text(question, shift), question.where) for question, shift in asked)
        check_prompts(tokenizer, texts, length - self.max_new_tokens)

    def _text(self, question: Choice, shift: int) -> str:
        examples = [listed(example, place) for place, example in enumerate(self.examples)]  # letters differ
        return prompt_text(INSTRUCTION, examples, listed(question, shift)[0])

    def _prompt(self, tokenizer, length: int, number: int, shift: int) -> LetterPrompt:
        question = self.questions[number]
        room = length - self.max_new_tokens
        return LetterPrompt(
            ids=prompt_ids(tokenizer, self._text(question, shift), question.where, room),
            length=length,
            references=(listed(question, shift)[1],),
            question=number,
            options=shifted_options(question, shift),
        )

    def score(self, answer: str, prompt: LetterPrompt) -> float:
        return float(chosen(answer, prompt.options) == prompt.references[0])

    def finished(self, text: str) -> bool:
        return bool(LETTER_IS_OVER.search(text.lstrip()))


def candidates(tokenizer, question: Choice) -> list[Candidate]:
    """Return a candidate for each option, in plain text without a chat format, as evaluations by likelihood do."""
    context = f"Question: {question.question}\nAnswer:"
    before, found = encode_open(tokenizer, context, special=True), []
    for option in question.options:
        ids = encode_open(tokenizer, f"{context} {option}", special=True)
        same = [a == b for a, b in zip(before, ids, strict=False)]
        start = same.index(False) if False in same else len(same)
        found.append(Candidate(ids=tuple(ids), start=max(1, start)))
    return found


def scorer(model, batch_size: int | None = None) -> Scorer:
    """Return what scores candidates with a model."""

    @torch.inference_mode()
    def score(options: list[Candidate]) -> list[float]:
        found = [0.0] * len(options)
        for batch in batches([len(option.ids) for option in options], model, batch_size):
            ids_BS = padded([options[index].ids for index in batch]).to(model.device)
            losses_BS = token_losses(model, ids_BS, chunk=1024).double().cpu()
            if not losses_BS.isfinite().all():
                raise HyLoError(
                    "the likelihood of an option is not finite: the weights are broken or overflow in this dtype"
                )
            for row, index in enumerate(batch):
                found[index] = -losses_BS[row, options[index].start - 1 :].sum().item()
        return found

    return score


def by_likelihood(tokenizer, questions: tuple[Choice, ...], score: Scorer) -> dict:
    """Return the summaries ``sum`` and ``normalised`` (log-probability per character), and each question's scores."""
    listed = [candidates(tokenizer, question) for question in questions]
    left = iter(score([option for options in listed for option in options]))
    samples = []
    for question in questions:
        sums = [next(left) for _ in question.options]
        means = [value / len(option) for value, option in zip(sums, question.options, strict=True)]
        hits = {"sum": _hit(sums, question), "normalised": _hit(means, question)}
        samples.append({"where": Path(question.where).name, "log_probabilities": sums, **hits})
    names = ("sum", "normalised")
    return {**{name: summary([sample[name] for sample in samples]) for name in names}, "samples": samples}


def _hit(values: list[float], question: Choice) -> float:
    """Return 1 if the right option has the largest value; options that share it share the hit."""
    best = [index for index, value in enumerate(values) if value == max(values)]
    return 1 / len(best) if question.answer in best else 0.0


def by_letter(task: Letters, tokenizer, answer: Answerer, length: int, label: str = "") -> dict:
    """Return the summary over questions; a question's score is the mean over the shifts of its options."""
    results = run(task, tokenizer, answer, lengths=(length,), samples=len(task.questions), label=label)["samples"]
    means = [row["accuracy"] for row in tally(results, "question")]
    return {**summary(means), "hits": round(sum(means), 4), "samples_of_shifts": results}


def chance(questions: tuple[Choice, ...]) -> float:
    """Return the expected score of a blind guesser."""
    return fmean(1 / len(question.options) for question in questions)
