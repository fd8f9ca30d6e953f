"""The measurements of a run's models, and where the results are written."""

from dataclasses import dataclass
from pathlib import Path

from hylo_megatron.evaluate.settings import Settings
from hylo_megatron.files import write_json
from hylo_megatron.recipes.stage import Recipe
from hylo_megatron.run.records import read_report
from hylo_megatron.run.training_process import fast_bf16

KINDS = {"prose": "eval_prose", "book": "eval_long", "code": "eval_code", "c": "eval_c", "long": "eval_long"}


@dataclass(frozen=True)
class Measurement:
    """The measurement of one model. ``full``: with needles and loss by position. ``report``: folder for tables."""

    name: str
    model: Path
    out: Path
    text: Path
    recipe: Recipe
    full: bool
    report: Path | None = None

    @property
    def result(self) -> Path:
        return self.out / f"eval-{self.name}.json"

    def __call__(self) -> None:
        """Measure and write ``result``. With a report, the teacher's figures are included."""
        from hylo_megatron.evaluate.runner import evaluate

        e = self.recipe.evaluation
        settings = Settings(
            context=e.context, ppl_tokens=e.tokens, needle_lengths=e.needle_lengths, needle_samples=e.needle_samples,
            needle_depths=e.needle_depths, long_context=e.long_context or e.context, long_documents=e.long_documents,
            skip=() if self.full else ("needle", "long"), dtype="bfloat16" if fast_bf16() else "float32",
        )  # fmt: skip
        files = {kind: self.text / f"{name}.jsonl" for kind, name in KINDS.items() if kind != "long" or e.long_context}
        teacher = read_report(self.out / "eval-teacher.json")["model"] if self.report else None
        report = evaluate(
            self.model, teacher_figures=teacher, out_dir=self.report,
            curves=[self.out / s.name / "train_log.jsonl" for s in self.recipe.stages] if self.report else (),
            settings=settings, **{kind: file for kind, file in files.items() if file.is_file()},
        )  # fmt: skip
        write_json(self.result, report, default=str)
