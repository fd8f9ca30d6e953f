"""The registry of suites: what each one measures, and the rows of the report's table that its figures give."""

import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase as Tokenizer

from hylo_megatron.evaluate import choice
from hylo_megatron.evaluate.answers import Answers
from hylo_megatron.evaluate.models import Loaded, prefill_chunk
from hylo_megatron.evaluate.needle import Needle
from hylo_megatron.evaluate.perplexity import (
    encode_documents,
    encode_long_documents,
    long_documents_of,
    perplexity_of,
)
from hylo_megatron.evaluate.questions import draw, read_answers, read_choices
from hylo_megatron.evaluate.ruler import tasks
from hylo_megatron.evaluate.ruler.base import RulerTask
from hylo_megatron.evaluate.run_task import answerer, run, tally
from hylo_megatron.evaluate.settings import Settings
from hylo_megatron.evaluate.task import Task

TEXTS = ("prose", "book", "code", "c")  # kinds of text with a perplexity
Files = dict[str, tuple[Path, ...]]  # by kind; "choice" and "answers" may have several files, others have one
Scores = Sequence[tuple[str, float]]  # a question, as a text that tells it from others, and its score


class Row(NamedTuple):
    """A row of the report's table. ``summary``: None for a length that was not run."""

    label: str
    summary: dict | None = None
    scores: Scores = ()


@dataclass(frozen=True, kw_only=True)
class Job:
    """One model with what it is measured on."""

    role: str
    loaded: Loaded
    files: Files
    settings: Settings

    def label(self, name: str) -> str:
        return f"{self.role}: {name}"

    def answerer(self, task: Task):
        settings = self.settings
        return answerer(self.loaded.model, self.loaded.tokenizer, task, settings.batch_size, settings.prefill_chunk)

    def run(self, task: Task, lengths: tuple[int, ...], samples: int) -> dict:
        how = {"lengths": lengths, "samples": samples, "seed": self.settings.seed, "label": self.label(task.name)}
        return run(task, self.loaded.tokenizer, self.answerer(task), **how)

    def losses(self, measure: Callable[..., dict], kind: str, label: str, *, context: int, **how) -> dict:
        """Return what ``measure``, a function of ``perplexity.py``, finds in the file of this kind."""
        settings = self.settings
        how |= {"form": settings.form, "batch_size": settings.batch_size, "context": context}
        how |= {"prefill": prefill_chunk(context, settings.prefill_chunk)}
        file = self.files[kind][0]
        return measure(self.loaded.model, self.loaded.tokenizer, file, label=self.label(label), **how)

    def split(self, lengths: tuple[int, ...]) -> tuple[tuple[int, ...], list[int]]:
        """Return the prompt lengths that this model gets, and the others."""
        allowed = self.settings.lengths_for(self.role, lengths)
        return allowed, [length for length in lengths if length not in allowed]


@dataclass(frozen=True, kw_only=True)
class Suite:
    """``needs``: kinds of files, any of which is enough. ``may_read``: further kinds, which can be absent.

    ``check`` refuses, with a tokenizer and without a model, what ``measure`` would refuse.
    """

    needs: tuple[str, ...]
    may_read: tuple[str, ...] = ()
    check: Callable[[Tokenizer, Files, Settings], None]
    measure: Callable[[Job], dict]
    rows: Callable[[dict], Iterator[Row]] = lambda figures: iter(())


def _check_perplexity(tokenizer: Tokenizer, files: Files, settings: Settings) -> None:
    for name in TEXTS:
        for file in files.get(name, ()):
            encode_documents(tokenizer, file, context=2, max_tokens=1, form=settings.form)


def _perplexity(job: Job) -> dict:
    how = {"context": job.settings.context, "max_tokens": job.settings.ppl_tokens}
    names = [name for name in TEXTS if name in job.files]
    return {name: job.losses(perplexity_of, name, name, whole=name == "book", **how) for name in names}


def _check_long(tokenizer: Tokenizer, files: Files, settings: Settings) -> None:
    how = {"context": settings.long_context, "join": settings.long_join, "form": settings.form}
    encode_long_documents(tokenizer, files["long"][0], count=1, **how)


def _long(job: Job) -> dict:
    settings = job.settings
    how = {"context": settings.long_context, "count": settings.long_documents, "join": settings.long_join}
    return job.losses(long_documents_of, "long", "long documents", **how)


def _needle_task(files: Files, settings: Settings) -> Needle:
    return Needle(file=files["prose"][0], depths=settings.needle_depths, form=settings.form)


def _check_needle(tokenizer: Tokenizer, files: Files, settings: Settings) -> None:
    task = _needle_task(files, settings)
    for length in settings.needle_lengths:
        task.check(tokenizer, length, settings.needle_samples, settings.seed)


def _needle(job: Job) -> dict:
    settings = job.settings
    lengths, not_run = job.split(settings.needle_lengths)
    figures = job.run(_needle_task(job.files, settings), lengths, settings.needle_samples)
    return {**figures, "not_run": not_run}


def _choice_tasks(files: Files, settings: Settings) -> Iterator[tuple[Path, choice.Letters]]:
    for file in files["choice"]:
        examples, questions = draw(read_choices(file), settings.shots, settings.questions, settings.seed)
        yield file, choice.Letters(name="letters", questions=questions, examples=examples)


def _choice(job: Job) -> dict:
    settings, found = job.settings, {}
    for file, task in _choice_tasks(job.files, settings):
        tokenizer, score = job.loaded.tokenizer, choice.scorer(job.loaded.model, settings.batch_size)
        label = job.label(f"letters of {file.stem}")
        found[file.stem] = {
            "chance": choice.chance(task.questions),
            "likelihood": choice.by_likelihood(tokenizer, task.questions, score),
            "letters": choice.by_letter(task, tokenizer, job.answerer(task), settings.context, label),
        }
    return found


def _answers_tasks(files: Files, settings: Settings) -> Iterator[tuple[Path, Answers]]:
    for file in files["answers"]:
        examples, questions = draw(read_answers(file), settings.shots, settings.questions, settings.seed)
        yield file, Answers(questions=questions, examples=examples)


def _answers(job: Job) -> dict:
    settings = job.settings
    tasks_of = _answers_tasks(job.files, settings)
    return {file.stem: job.run(task, (settings.context,), len(task.questions)) for file, task in tasks_of}


def _checker_of(tasks_of: Callable[[Files, Settings], Iterator[tuple[Path, Task]]]):
    """Return the ``check`` of a suite with a task of questions for each file."""

    def check(tokenizer: Tokenizer, files: Files, settings: Settings) -> None:
        for _, task in tasks_of(files, settings):
            task.check(tokenizer, settings.context, len(task.questions), settings.seed)

    return check


def _ruler_tasks(files: Files, settings: Settings) -> tuple[RulerTask, ...]:
    given = {kind: files[f"ruler_{kind}"][0] for kind in ("squad", "hotpot") if f"ruler_{kind}" in files}
    return tasks(files["prose"][0], **given, form=settings.form)


def _check_ruler(tokenizer: Tokenizer, files: Files, settings: Settings) -> None:
    for task, length in itertools.product(_ruler_tasks(files, settings), settings.ruler_lengths):
        task.check(tokenizer, length, settings.ruler_samples, settings.seed)


def _ruler(job: Job) -> dict:
    settings, found = job.settings, {}
    lengths, not_run = job.split(settings.ruler_lengths)
    for task in _ruler_tasks(job.files, settings):
        found[task.name] = job.run(task, lengths, settings.ruler_samples)
    samples = [sample for result in found.values() for sample in result["samples"]]
    return {"tasks": found, "by_length": tally(samples, "length"), "not_run": not_run}


# ---- rows of the report's table ----


def _question(sample: dict) -> str:
    """Return all that a record says of its prompt; two models have read one prompt if the texts are equal."""
    return json.dumps({name: value for name, value in sample.items() if name not in ("answer", "score")}, default=str)


def _scores(samples: Iterable[dict]) -> Scores:
    return [(_question(sample), sample["score"]) for sample in samples]


def _length_rows(name: str, result: dict, samples: Iterable[dict]) -> Iterator[Row]:
    """Yield a row for each length, also for those that were not run."""
    for row in result["by_length"]:
        own = (sample for sample in samples if sample["length"] == row["length"])
        yield Row(f"{name}, {row['length']:,} tokens", row, _scores(own))
    for length in result.get("not_run", ()):
        yield Row(f"{name}, {length:,} tokens")


def _needle_rows(figures: dict) -> Iterator[Row]:
    yield from _length_rows("needle", figures, figures.get("samples", ()))


def _choice_rows(figures: dict) -> Iterator[Row]:
    for name, result in figures.items():
        at = f"(chance {100 * result['chance']:.0f} %)"
        samples = result["likelihood"].get("samples", ())
        for way, how in (("sum", ""), ("normalised", " per character")):
            scores = [(sample["where"], sample[way]) for sample in samples]
            yield Row(f"{name}, likelihood{how} {at}", result["likelihood"][way], scores)
        shifts: dict[int, list[dict]] = {}
        for sample in result["letters"].get("samples_of_shifts", ()):
            shifts.setdefault(sample["question"], []).append(sample)
        scores = [(_question(each[0]), fmean(one["score"] for one in each)) for each in shifts.values()]
        yield Row(f"{name}, written {at}", result["letters"], scores)


def _answers_rows(figures: dict) -> Iterator[Row]:
    for name, result in figures.items():
        yield Row(f"{name}, exact match", result["by_length"][0], _scores(result.get("samples", ())))


def _ruler_rows(figures: dict) -> Iterator[Row]:
    tasks = figures["tasks"]
    together = [{"task": name, **sample} for name, result in tasks.items() for sample in result.get("samples", ())]
    yield from _length_rows(f"RULER, mean of {len(tasks)}", figures, together)
    for name, result in tasks.items():
        yield from _length_rows(f"RULER {name}", result, result.get("samples", ()))


REGISTRY = {
    "perplexity": Suite(needs=TEXTS, check=_check_perplexity, measure=_perplexity),
    "long": Suite(needs=("long",), check=_check_long, measure=_long),
    "needle": Suite(needs=("prose",), check=_check_needle, measure=_needle, rows=_needle_rows),
    "choice": Suite(needs=("choice",), check=_checker_of(_choice_tasks), measure=_choice, rows=_choice_rows),
    "answers": Suite(needs=("answers",), check=_checker_of(_answers_tasks), measure=_answers, rows=_answers_rows),
    "ruler": Suite(
        needs=("prose",),
        may_read=("ruler_squad", "ruler_hotpot"),
        check=_check_ruler,
        measure=_ruler,
        rows=_ruler_rows,
    ),
}
