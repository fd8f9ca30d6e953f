"""Settings of an evaluation."""

import argparse
from dataclasses import dataclass

from hylo_megatron.data.formats import FORMATS
from hylo_megatron.errors import HyLoError
from hylo_megatron.flags import count, positive, size
from hylo_megatron.options import option

DEFAULT_SUITES = ("perplexity", "long", "needle", "choice", "answers")
SUITES = (*DEFAULT_SUITES, "ruler")
MEASURED = ("prose", "book", "code", "c", "long", "choice", "answers")  # kinds of files that a suite is measured on
KINDS = (*MEASURED, "ruler_squad", "ruler_hotpot")


def lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(size(part) for part in text.split(","))
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error}, several with commas as in 1024,2048") from None


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# fmt: off
@dataclass(frozen=True)
class Settings:
    """Settings of the measurements, most of them flags. ``suites`` empty: those of ``DEFAULT_SUITES`` with a file."""

    suites: tuple[str, ...] = ()
    skip: tuple[str, ...] = ()
    dtype: str = "auto"
    form: str | None = None  # of the files of text
    teacher_yarn: float | None = option(
        "--teacher-yarn", None, positive, "measure the teacher also with YaRN of this factor")
    device: str = option("--device", "auto", str, "auto, cpu, cuda, cuda:1 ...")
    seed: int = option("--seed", 0, count, "random seed of the needles")
    batch_size: int | None = option(
        "--batch-size", None, size, "sequences per batch; by default as many as suit the device")
    prefill_chunk: int | None = option(
        "--prefill-chunk", None, size,
        "tokens that one forward pass reads (default: 32,768, and fewer of longer texts, whose masks would be large)")
    context: int = option("--context", 2048, size, "tokens to which documents are cut")
    ppl_tokens: int = option("--ppl-tokens", 20_000, size, "tokens that are scored of each file")
    long_context: int = option(
        "--long-context", 32_768, size, "tokens of a long document; shorter documents are skipped")
    long_documents: int = option("--long-documents", 4, size, "long documents to score")
    long_join: bool = option(
        "--long-join", False, help="join documents shorter than --long-context, as parts of one work")
    questions: int | None = option("--questions", None, size, "questions drawn from each file; all")
    shots: int = option(
        "--shots", 3, count, "answered examples, from the same file, before a question to be answered")
    needle_lengths: tuple[int, ...] = option(
        "--needle-lengths", (1024, 2048), lengths,
        "prompt lengths in tokens, including the answer (default: 1024,2048)")
    needle_samples: int = option("--needle-samples", 4, size, "prompts for each length and depth")
    needle_depths: int = option("--needle-depths", 5, size, "number of depths, from the first to the last sentence")
    teacher_needle_limit: int | None = option(
        "--teacher-needle-limit", None, size, "longest prompt, in tokens, that the teacher gets; no limit")
    ruler_lengths: tuple[int, ...] = option(
        "--ruler-lengths", (4096,), lengths, "RULER's prompt lengths in tokens, including the answer (default: 4096)")
    ruler_samples: int = option("--ruler-samples", 20, size, "prompts for each RULER task and length")
    # fmt: on

    def __post_init__(self):
        for name in (
            "context", "ppl_tokens", "long_context", "long_documents", "needle_samples", "needle_depths", "batch_size",
            "ruler_samples", "questions", "prefill_chunk", "needle_lengths", "ruler_lengths",
        ):  # fmt: skip
            value = getattr(self, name)
            value = min(value, default=0) if isinstance(value, tuple) else value
            least = 2 if name in ("context", "long_context") else 1  # the first token of a document has no loss
            if value is not None and value < least:
                raise HyLoError(f"{_flag(name)} {value}: expected {least} or more")
        for name in ("needle_lengths", "ruler_lengths"):
            lengths = getattr(self, name)
            if len(set(lengths)) < len(lengths):
                raise HyLoError(f"{_flag(name)} {','.join(map(str, lengths))}: expected each length once")
        for verb, names in (("skip", self.skip), ("measure", self.suites)):
            if unknown := set(names) - set(SUITES):
                raise HyLoError(f"cannot {verb} {', '.join(sorted(unknown))}: the parts are {', '.join(SUITES)}")
        if self.form not in (None, *FORMATS):
            raise HyLoError(f"--format {self.form}: expected {', '.join(FORMATS)}")
        if self.teacher_yarn is not None and not self.teacher_yarn > 1:
            raise HyLoError(f"--teacher-yarn {self.teacher_yarn:g}: expected a factor above 1")
        if not self.lengths_for("teacher", self.needle_lengths):
            raise HyLoError(
                f"--teacher-needle-limit {self.teacher_needle_limit}: leaves the teacher no needle length; raise it to"
                f" {min(self.needle_lengths)} or more"
            )

    def lengths_for(self, role: str, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Return the prompt lengths that a model gets; only the teacher has a limit."""
        limit = self.teacher_needle_limit if role == "teacher" else None
        return tuple(length for length in lengths if limit is None or length <= limit)
