"""Settings of an evaluation."""

from dataclasses import dataclass

from hylo_megatron.errors import HyLoError

DEFAULT_SUITES = ("perplexity", "long", "needle", "choice", "answers")
SUITES = (*DEFAULT_SUITES, "ruler")
MEASURED = ("prose", "book", "code", "c", "long", "choice", "answers")  # kinds of files that a suite is measured on
KINDS = (*MEASURED, "ruler_squad", "ruler_hotpot")


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements.

    Lengths are in tokens. ``suites`` empty: those of ``DEFAULT_SUITES`` that have a file. ``long_join``: documents
    shorter than ``long_context`` are joined. ``batch_size`` None suits the device. ``needle_samples`` and
    ``ruler_samples`` are per cell. ``teacher_needle_limit``: the teacher gets no longer prompts, for example prompts
    far beyond its training length. ``questions``: questions drawn from each file;
    ``shots``: answered examples before each.
    ``prefill_chunk``: tokens of a prompt or document that one forward pass reads. ``teacher_yarn``: YaRN's factor for
    a second measurement of the teacher.
    """

    context: int = 2048
    ppl_tokens: int = 20_000
    long_context: int = 32_768
    long_documents: int = 4
    long_join: bool = False
    needle_lengths: tuple[int, ...] = (1024, 2048)
    needle_samples: int = 4
    needle_depths: int = 5
    teacher_needle_limit: int | None = None
    skip: tuple[str, ...] = ()
    batch_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0
    suites: tuple[str, ...] = ()
    ruler_lengths: tuple[int, ...] = (4096,)
    ruler_samples: int = 20
    questions: int | None = None
    shots: int = 3
    prefill_chunk: int = 32_768
    teacher_yarn: float | None = None

    def __post_init__(self):
        for name in (
            "context", "ppl_tokens", "long_context", "long_documents", "needle_samples", "needle_depths", "batch_size",
            "ruler_samples", "questions", "prefill_chunk", "needle_lengths", "ruler_lengths",
        ):  # fmt: skip
            value = getattr(self, name)
            value = min(value, default=0) if isinstance(value, tuple) else value
            if value is not None and value < 1:
                raise HyLoError(f"evaluation setting {name} is {value}, expected 1 or more")
        for name in ("needle_lengths", "ruler_lengths"):
            lengths = getattr(self, name)
            if len(set(lengths)) < len(lengths):
                raise HyLoError(f"evaluation setting {name} has a length twice, expected different ones: {lengths}")
        for verb, names in (("skip", self.skip), ("measure", self.suites)):
            if unknown := set(names) - set(SUITES):
                raise HyLoError(f"cannot {verb} {', '.join(sorted(unknown))}: the parts are {', '.join(SUITES)}")
        if self.teacher_yarn is not None and not self.teacher_yarn > 1:
            raise HyLoError(f"evaluation setting teacher_yarn is {self.teacher_yarn}, expected a factor above 1")
        if not self.lengths_for("teacher", self.needle_lengths):
            raise HyLoError(
                f"teacher_needle_limit {self.teacher_needle_limit} leaves the teacher no needle length: raise it to "
                f"{min(self.needle_lengths)} or more"
            )

    def lengths_for(self, role: str, lengths: tuple[int, ...]) -> tuple[int, ...]:
        """Return the prompt lengths that a model gets; only the teacher has a limit."""
        limit = self.teacher_needle_limit if role == "teacher" else None
        return tuple(length for length in lengths if limit is None or length <= limit)
