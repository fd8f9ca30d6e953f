"""The ranking of a method that measures models: window, smart, kl or gates."""

import shutil
from argparse import Namespace
from pathlib import Path

import torch

from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.models import check_folder, resolve_device, resolve_dtype
from hylo_megatron.sample.fingerprint import fingerprint
from hylo_megatron.select.cache import Cache, Layers
from hylo_megatron.select.distilled import measure_distilled
from hylo_megatron.select.gates import GateState, GateTraining
from hylo_megatron.select.judge import Judge, Measured
from hylo_megatron.select.models import Pair, Windowed, hf_folder, load_pair, load_windowed
from hylo_megatron.select.ranking import NONE, Bench, Ranking, Score, greedy, one_by_one
from hylo_megatron.select.ranks import Ranks
from hylo_megatron.select.rows import Rows, read_samples, read_text

EXPORTED = "exported"  # folder of Hugging Face folders made of checkpoints, while a selection runs
GATES = "gates.json"


def measured(options: Namespace, ranks: Ranks, count: int) -> Ranking:
    """Rank the layers. ``count``: MLA layers of the plan. Raises ``HyLoError``."""
    exported = options.out / EXPORTED
    try:
        folders = ranks.from_first(_folders(options, exported) if ranks.first else None)
        device = resolve_device(ranks.device(options.device))
        dtype = resolve_dtype(options.dtype, device)
        rows = _rows(options, folders[0])
        settings = _settings(options, count, folders, dtype, rows)
        cache = ranks.from_first(Cache(options.out, settings) if ranks.first else None)
        if device.index is not None:
            torch.cuda.set_device(device)  # Triton starts its kernels on the current device
        if options.method == "window":
            pair = load_windowed(*folders, options.window, device, dtype)
        else:
            pair = load_pair(*folders, device, dtype)
        return _ranking(options, ranks, count, pair, cache, rows)
    finally:
        if ranks.first:
            shutil.rmtree(exported, ignore_errors=True)


def _folders(options: Namespace, exported: Path) -> tuple[Path, ...]:
    """Return the Hugging Face folders of the teacher and of a student; checkpoints are exported."""
    shutil.rmtree(exported, ignore_errors=True)
    models = {"teacher": options.teacher, "student": options.student}
    return tuple(check_folder(hf_folder(path, exported / name)) for name, path in models.items() if path)


def _settings(options: Namespace, count: int, folders: tuple[Path, ...], dtype: torch.dtype, rows: tuple) -> dict:
    """Return what measurements depend on."""
    settings = {"method": options.method, "rows": rows[0].digest()}
    settings |= dict(zip(("teacher", "student"), map(fingerprint, folders), strict=False))
    if options.method == "window":
        settings["window"] = options.window
    settings["dtype"] = str(dtype).removeprefix("torch.")
    if options.training:
        settings |= vars(options.training) | {"training_rows": rows[1].digest()}
    if options.method == "gates":
        settings |= {"mla": count, "retrieval_weight": options.retrieval_weight}
    return settings


def _rows(options: Namespace, tokenizer: Path) -> tuple[Rows, Rows | None]:
    """Return the rows to measure on, and those to train on: later rows of the same files."""
    training, trained = options.training, options.train_tokens if options.training else 0
    text_BS = read_text(options.text, tokenizer, options.tokens, trained, options.length)
    few = options.tokens // options.length
    rows = {"text_BS": (text_BS[:few], text_BS[few:])}
    if options.retrieval is not None:
        few = options.retrieval_samples
        wanted = training.steps * training.batch if options.method == "gates" else 0
        samples = read_samples(options.retrieval, tokenizer, few, wanted)
        rows |= {
            name: (part[:few], part[few:]) for name, part in zip(("samples_BS", "answers_BS"), samples, strict=True)
        }
        if wanted and (left := len(samples[0]) - few) < training.batch:
            raise HyLoError(
                f"--retrieval {options.retrieval}: {few} samples are measured and {left} left to train on, expected"
                f" --train-batch {training.batch} or more; make more samples"
            )
    both = [Rows(**{name: parts[place] for name, parts in rows.items()}) for place in (0, 1)]
    return both[0], both[1] if training else None


def _ranking(
    options: Namespace, ranks: Ranks, count: int, pair: Pair | Windowed, cache: Cache, rows: tuple
) -> Ranking:
    judge, training = Judge(pair.teacher, rows[0], options.batch_size), options.training

    def measure(layers: Layers) -> Measured:
        if options.method == "kl":
            return measure_distilled(pair, judge, training, rows[1].text_BS, layers)
        with pair.restored(sorted(layers)) as student:
            return judge(student)

    bench = Bench(measure, cache, ranks)
    score = Score(base=bench([NONE])[NONE], teacher=judge.answered, weight=options.retrieval_weight)
    if options.method == "gates":
        state = GateState.begin(options.out / GATES, pair.num_layers, training.lr)
        return GateTraining(pair=pair, training=training, rows=rows[1], score=score, count=count)(state, ranks)
    if options.greedy:
        return greedy(bench, score, pair.num_layers, count)
    return one_by_one(bench, score, pair.num_layers)
