"""``evaluate``: every measurement of one model, or of a teacher and a model."""

import gc
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from hylo_megatron.data.documents import check_texts
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import models
from hylo_megatron.evaluate.needle import needles_of
from hylo_megatron.evaluate.perplexity import long_documents_of, perplexity_of
from hylo_megatron.evaluate.plots import new_figure, read_log
from hylo_megatron.evaluate.report import TEXTS, ratios_of, write_report

PARTS = ("perplexity", "long", "needle")


@dataclass(frozen=True)
class Settings:
    """Settings of the measurements.

    Lengths are in tokens. ``batch_size`` None suits the device. ``needle_samples`` is per cell.
    ``teacher_needle_limit``: the teacher gets no longer prompts, for example prompts far beyond its training length.
    """

    context: int = 2048
    ppl_tokens: int = 20_000
    long_context: int = 32_768
    long_documents: int = 4
    needle_lengths: tuple[int, ...] = (1024, 2048)
    needle_samples: int = 4
    needle_depths: int = 5
    teacher_needle_limit: int | None = None
    skip: tuple[str, ...] = ()
    batch_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self):
        counts = {
            "context": self.context,
            "ppl_tokens": self.ppl_tokens,
            "long_context": self.long_context,
            "long_documents": self.long_documents,
            "needle_samples": self.needle_samples,
            "needle_depths": self.needle_depths,
            "batch_size": self.batch_size,
            "needle_lengths": min(self.needle_lengths, default=0),
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise HyLoError(f"evaluation setting {name} is {value}, expected 1 or more")
        if unknown := set(self.skip) - set(PARTS):
            raise HyLoError(f"cannot skip {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")
        if not self.needle_lengths_of("teacher"):
            raise HyLoError(
                f"teacher_needle_limit {self.teacher_needle_limit} leaves the teacher no needle length: raise it to "
                f"{min(self.needle_lengths)} or more"
            )

    def needle_lengths_of(self, role: str) -> tuple[int, ...]:
        limit = self.teacher_needle_limit if role == "teacher" else None
        return tuple(length for length in self.needle_lengths if limit is None or length <= limit)


def measure(folder: str | Path, role: str, files: dict[str, Path], settings: Settings) -> dict:
    """Return all figures of one model, which is freed afterwards. ``files``: the existing text files, by kind."""
    device = models.resolve_device(settings.device)
    print(f"{role}: loading {Path(folder).name}", flush=True)
    loaded = models.load(folder, device, models.resolve_dtype(settings.dtype, device))
    figures = models.describe(loaded)
    common = {"model": loaded.model, "tokenizer": loaded.tokenizer, "batch_size": settings.batch_size}
    if "long" not in settings.skip and "long" in files:
        figures["long"] = long_documents_of(
            **common,
            file=files["long"],
            context=settings.long_context,
            count=settings.long_documents,
            label=f"{role}: long documents",
        )
    if "perplexity" not in settings.skip:
        figures["perplexity"] = {
            name: perplexity_of(
                **common,
                file=files[name],
                context=settings.context,
                max_tokens=settings.ppl_tokens,
                whole=name == "book",
                label=f"{role}: {name}",
            )
            for name in TEXTS
            if name in files
        }
    if "needle" not in settings.skip and "prose" in files:
        lengths = settings.needle_lengths_of(role)
        figures["needle"] = needles_of(
            **common,
            file=files["prose"],
            lengths=lengths,
            depths=settings.needle_depths,
            samples=settings.needle_samples,
            seed=settings.seed,
            label=f"{role}: needle",
        )
        figures["needle"]["not_run"] = [length for length in settings.needle_lengths if length not in lengths]
    del loaded, common
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return figures


def evaluate(
    model_dir: str | Path,
    *,
    teacher_dir: str | Path | None = None,
    teacher_figures: dict | None = None,
    out_dir: str | Path | None = None,
    prose: str | Path | None = None,
    book: str | Path | None = None,
    code: str | Path | None = None,
    c: str | Path | None = None,
    long: str | Path | None = None,
    curves: Sequence[str | Path] = (),
    settings: Settings | None = None,
) -> dict:
    """Measure a Hugging Face folder, optionally with its teacher. With ``out_dir`` write JSON, Markdown and PNG files.

    ``prose``, ``book`` (complete documents, in windows), ``code``, ``c`` and ``long`` (loss by position in long
    documents) are text files as for ``hylo prepare-data``. What has no file is not measured (needles need ``prose``).
    ``teacher_figures``: what an earlier call for the teacher alone returned under "model", with the same files and
    settings; the teacher is not measured again then. ``curves``: training logs, JSON lines with stage, iteration and
    loss.
    """
    settings = settings or Settings()
    folders = {"teacher": teacher_dir, "model": model_dir}
    folders = {role: models.check_folder(folder) for role, folder in folders.items() if folder is not None}
    files = {"prose": prose, "book": book, "code": code, "c": c, "long": long}
    files = {name: Path(file) for name, file in files.items() if file}
    for file in files.values():
        check_texts(file)  # refuses the file now, not after minutes of measuring
    device = models.resolve_device(settings.device)
    dtype = models.resolve_dtype(settings.dtype, device)
    if out_dir is not None:  # fails now, not after minutes of measuring
        new_figure(1, 1)
        for log in curves:
            read_log(log)
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
    figures = {"teacher": teacher_figures} if teacher_figures else {}
    figures |= {role: measure(folder, role, files, settings) for role, folder in folders.items()}
    report = {
        **figures,
        "ratios": ratios_of(figures["teacher"], figures["model"]) if "teacher" in figures else {},
        "settings": asdict(settings),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "dtype": str(dtype).removeprefix("torch."),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    return write_report(report, out_dir, curves) if out_dir is not None else report
