"""``evaluate``: every measurement of a model, beside its teacher, the teacher with YaRN and a control."""

import gc
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import transformers

from hylo_megatron.convert.tokenizer_files import open_tokenizer
from hylo_megatron.data.documents import check_texts
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate import models
from hylo_megatron.evaluate.compare import BASES, compared, differences
from hylo_megatron.evaluate.encoding import question_text
from hylo_megatron.evaluate.plots import new_figure, read_log
from hylo_megatron.evaluate.questions import read_answers, read_choices
from hylo_megatron.evaluate.report import write_report
from hylo_megatron.evaluate.ruler.questions import read_library
from hylo_megatron.evaluate.settings import DEFAULT_SUITES, KINDS, Settings
from hylo_megatron.evaluate.suites import REGISTRY, TEXTS, Files, Job

READERS = {"choice": read_choices, "answers": read_answers, "ruler_squad": read_library, "ruler_hotpot": read_library}
ASKING = {"needle", "choice", "answers", "ruler"}  # suites with questions, which the chat template renders
LOSSES = {"perplexity", "long", "choice"}  # suites with losses of tokens
SEVERAL = ("choice", "answers")  # kinds with figures for each of several files


def suites_for(files: Files, settings: Settings) -> list[str]:
    """Return the suites to measure: those asked for, or the default ones that have a file."""
    wanted = [name for name in settings.suites or DEFAULT_SUITES if name not in settings.skip]
    found = [name for name in wanted if set(REGISTRY[name].needs) & set(files)]
    if settings.suites and (lacking := [name for name in wanted if name not in found]):
        needs = " or ".join(f"--{kind}" for kind in REGISTRY[lacking[0]].needs)
        raise HyLoError(f"suite {lacking[0]} has no file to measure on: give {needs}")
    return found


def _flag(kind: str) -> str:
    return f"--{kind.replace('_', '-')}"


def check_files(files: Files, settings: Settings) -> None:
    """Refuse a file that no suite reads. Files of suites that are skipped may be given. Raises ``HyLoError``."""
    found = suites_for(files, settings)
    for kind in files:
        readers = [name for name, suite in REGISTRY.items() if kind in suite.needs + suite.may_read]
        if not set(readers) & {*found, *settings.skip}:
            flag, names = _flag(kind), " or ".join(readers)
            raise HyLoError(f"no chosen suite reads {flag}: name {names} in --suite, or leave out {flag}")
    if settings.form and not set(files) & {"long", *TEXTS}:
        raise HyLoError(f"--format {settings.form}: is that of text files, and none is given; leave it out")
    if files and not found:
        raise HyLoError(f"--skip {' '.join(settings.skip)} leaves nothing to measure on the given files: skip less")


def check_model(folder: Path, role: str, files: Files, settings: Settings) -> None:
    """Refuse a model that cannot be measured by its config.json, before any is loaded. Raises ``HyLoError``."""
    config = models.read_config(folder, settings.teacher_yarn if role == "teacher_yarn" else None)
    suites = set(suites_for(files, settings))
    if LOSSES & suites:
        models.check_logits(config)
    lengths = {
        "--context": (settings.context,) if "perplexity" in suites else (),
        "--long-context": (settings.long_context,) if "long" in suites else (),
        "--needle-lengths": settings.lengths_for(role, settings.needle_lengths) if "needle" in suites else (),
        "--ruler-lengths": settings.lengths_for(role, settings.ruler_lengths) if "ruler" in suites else (),
    }
    most = models.most_positions(config)
    for flag, wanted in lengths.items():
        if most and max(wanted, default=0) > most:
            raise HyLoError(f"{flag} {max(wanted)}: {folder} has positions for {most} tokens and no more; give less")


def check_prompts(folder: Path, files: Files, settings: Settings) -> None:
    """Refuse, with the tokenizer of a folder and without its model, what a suite would refuse after minutes.

    Raises ``HyLoError``.
    """
    tokenizer, suites = open_tokenizer(folder), suites_for(files, settings)
    if ASKING & set(suites):
        question_text(tokenizer, "Which?", "This")
    for name in suites:
        REGISTRY[name].check(tokenizer, files, settings)


def measure(folder: str | Path, role: str, files: Files, settings: Settings) -> dict:
    """Return all figures of one model, which is freed afterwards. ``files``: the existing files, by kind."""
    device = models.resolve_device(settings.device)
    print(f"{role}: loading {Path(folder).name}", flush=True)
    yarn = settings.teacher_yarn if role == "teacher_yarn" else None
    loaded = models.load(folder, device, models.resolve_dtype(settings.dtype, device), yarn)
    figures = models.describe(loaded) | ({"yarn": yarn} if yarn else {})
    job = Job(role=role, loaded=loaded, files=files, settings=settings)
    for name in suites_for(files, settings):
        figures[name] = REGISTRY[name].measure(job)
    del loaded, job
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return figures


def _given_files(given: dict[str, Any], form: str | None) -> Files:
    """Return the files by kind. Refuses a file that cannot be read now, not after minutes of measuring."""
    if unknown := set(given) - set(KINDS):
        raise TypeError(f"evaluate() has no argument {unknown.pop()!r}")
    files = {}
    for kind, paths in given.items():
        paths = [paths] if isinstance(paths, str | Path) else paths or ()
        if "" in paths:
            raise HyLoError(f"{_flag(kind)}: the name of the file is empty; name one, or leave out the flag")
        if len(paths) > 1 and kind not in SEVERAL:
            raise HyLoError(f"--{kind}: {len(paths)} files, expected one: join them in one file")
        if len({Path(file).stem for file in paths}) < len(paths):
            raise HyLoError(f"--{kind}: two files have one name, which is the name of their figures: rename one")
        for file in paths:
            reader = READERS.get(kind)
            reader(Path(file)) if reader else check_texts(Path(file), form)
        if paths:
            files[kind] = tuple(map(Path, paths))
    return files


def evaluate(
    model_dir: str | Path,
    *,
    teacher_dir: str | Path | None = None,
    teacher_figures: dict | None = None,
    control_dir: str | Path | None = None,
    out_dir: str | Path | None = None,
    curves: Sequence[str | Path] = (),
    settings: Settings | None = None,
    **files: str | Path | Sequence[str | Path] | None,
) -> dict:
    """Measure a Hugging Face folder, optionally beside others. ``out_dir`` gets JSON, Markdown, HTML and PNG files.

    ``files``: what is measured on, by kind. ``prose``, ``book`` (complete documents, in windows), ``code``, ``c`` and
    ``long`` (loss by position in long documents) are text files as for ``hylo prepare-data``; ``choice`` and
    ``answers`` are lists of files of questions. What has no file is not measured (needles and RULER need ``prose``).
    ``ruler_squad`` and ``ruler_hotpot``: questions in the layouts of SQuAD and HotpotQA for two of RULER's tasks.
    ``control_dir``: the teacher after training on the student's tokens. ``teacher_figures``: what an earlier call for
    the teacher alone returned under "model", with the same files and settings; the teacher is not measured again then.
    ``curves``: training logs, JSON lines with stage, iteration and loss.
    """
    settings = settings or Settings()
    if settings.teacher_yarn and teacher_dir is None:
        raise HyLoError("--teacher-yarn measures the teacher once more, with YaRN: give --teacher")
    yarn_dir = teacher_dir if settings.teacher_yarn else None
    folders = {"teacher": teacher_dir, "teacher_yarn": yarn_dir, "control": control_dir, "model": model_dir}
    folders = {role: models.check_folder(folder) for role, folder in folders.items() if folder is not None}
    files = _given_files(files, settings.form)
    check_files(files, settings)
    for role, folder in folders.items():  # now, not after minutes of measuring the others
        check_model(folder, role, files, settings)
    for folder in dict.fromkeys(folders.values()):
        check_prompts(folder, files, settings)
    device = models.resolve_device(settings.device)
    dtype = models.resolve_dtype(settings.dtype, device)
    if out_dir is not None:  # fails now, not after minutes of measuring
        new_figure(1, 1)
        for log in curves:
            read_log(log)
        out_dir = Path(out_dir)
        out_dir.mkdir(parents=True, exist_ok=True)
        if not os.access(out_dir, os.W_OK):
            raise HyLoError(f"{out_dir}: cannot be written to; choose another --out")
    figures = {"teacher": teacher_figures} if teacher_figures else {}
    figures |= {role: measure(folder, role, files, settings) for role, folder in folders.items()}
    model, bases = figures["model"], {base: figures[base] for base in BASES if base in figures}
    ratios = {base: compared(other, model) for base, other in bases.items()}
    report = {
        **figures,
        "ratios": {name: found["ratio"] for name, found in ratios.get("teacher", {}).items()},
        "compared_with": ratios,
        "differences": {base: differences(other, model) for base, other in bases.items()},
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
