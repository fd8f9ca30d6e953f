"""``evaluate``: every measurement of one model, or of a teacher and a model beside each other."""

import gc
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import models
from hylo_megatron.evaluate.needle import needles_of
from hylo_megatron.evaluate.perplexity import perplexity_of
from hylo_megatron.evaluate.plots import new_figure, read_log
from hylo_megatron.evaluate.report import ratios_of, write_report
from hylo_megatron.evaluate.texts import check_file

PARTS = ("perplexity", "needle")


@dataclass(frozen=True)
class Settings:
    """How to measure. Lengths in tokens; ``batch_size`` None suits the device; ``needle_samples`` is per cell."""

    context: int = 2048
    ppl_tokens: int = 20_000
    needle_lengths: tuple[int, ...] = (1024, 2048)
    needle_samples: int = 4
    needle_depths: int = 5
    skip: tuple[str, ...] = ()
    batch_size: int | None = None
    dtype: str = "auto"
    device: str = "auto"
    seed: int = 0

    def __post_init__(self):
        counts = {
            "context": self.context,
            "ppl_tokens": self.ppl_tokens,
            "needle_samples": self.needle_samples,
            "needle_depths": self.needle_depths,
            "batch_size": self.batch_size,
            "needle_lengths": min(self.needle_lengths, default=0),
        }
        for name, value in counts.items():
            if value is not None and value < 1:
                raise HyLoError(f"evaluation setting {name} has to be 1 or more, not {value}")
        if unknown := set(self.skip) - set(PARTS):
            raise HyLoError(f"cannot skip {', '.join(sorted(unknown))}: the parts are {', '.join(PARTS)}")


def measure(folder: str | Path, role: str, prose: Path | None, code: Path | None, settings: Settings) -> dict:
    """All figures of one model; the model is freed afterwards."""
    device = models.resolve_device(settings.device)
    print(f"{role}: loading {Path(folder).name}", flush=True)
    loaded = models.load(folder, device, models.resolve_dtype(settings.dtype, device))
    figures = models.describe(loaded)
    if "perplexity" not in settings.skip:
        figures["perplexity"] = {
            name: perplexity_of(
                loaded.model,
                loaded.tokenizer,
                file,
                context=settings.context,
                max_tokens=settings.ppl_tokens,
                batch_size=settings.batch_size,
                label=f"{role}: {name}",
            )
            for name, file in (("prose", prose), ("code", code))
            if file
        }
    if "needle" not in settings.skip and prose:
        figures["needle"] = needles_of(
            loaded.model,
            loaded.tokenizer,
            prose,
            lengths=settings.needle_lengths,
            depths=settings.needle_depths,
            samples=settings.needle_samples,
            seed=settings.seed,
            batch_size=settings.batch_size,
            label=f"{role}: needle",
        )
    del loaded
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return figures


def evaluate(
    model_dir: str | Path,
    *,
    teacher_dir: str | Path | None = None,
    out_dir: str | Path | None = None,
    prose: str | Path | None = None,
    code: str | Path | None = None,
    curves: Sequence[str | Path] = (),
    settings: Settings | None = None,
) -> dict:
    """Measures a Hugging Face folder, and a teacher beside it; with ``out_dir`` writes JSON, Markdown and PNG files.

    ``prose`` and ``code``: JSON lines with ``text``; what has no file is left out (needles need ``prose``).
    ``curves``: training logs, JSON lines with stage, iteration, loss.
    """
    settings = settings or Settings()
    folders = {"teacher": teacher_dir, "model": model_dir}
    folders = {role: models.check_folder(folder) for role, folder in folders.items() if folder is not None}
    prose, code = (check_file(file) if file else None for file in (prose, code))
    device = models.resolve_device(settings.device)
    dtype = models.resolve_dtype(settings.dtype, device)
    if out_dir is not None:  # found out now, not after minutes of measuring
        new_figure(1, 1)
        for log in curves:
            read_log(log)
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
    figures = {role: measure(folder, role, prose, code, settings) for role, folder in folders.items()}
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
