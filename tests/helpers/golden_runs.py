"""Short trainings whose losses are under version control, and the inputs that seeds make for them.

All numbers come from numpy's ``RandomState``, whose streams no release changes. Each tensor has a seed of its own, so
that neither the order of the tensors nor a new one beside them moves the others.
"""

import json
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from helpers import tiny
from helpers import train as helpers
from helpers.paths import ROOT

import hylo_megatron.checkpoint.folder
import hylo_megatron.config
import hylo_megatron.config.shapes
import hylo_megatron.convert.hf_to_megatron
import hylo_megatron.data.token_writer
import hylo_megatron.mixers

FOLDER = ROOT / "tests" / "golden" / "losses"
KINDS, STAGES = ("gdn", "mamba2", "kda"), ("ild", "distill")
LAYOUTS = {  # name in a file's name: processes, flags
    "single": (1, {}),
    "tp2-pp2": (4, dict(tensor_model_parallel_size=2, pipeline_model_parallel_size=2)),
}
STEPS, SEQUENCES = 6, 40
# Relative. One process and four differ by at most 2e-6 (a gradient norm; losses 4e-7), from rounding alone.
BAR = 1e-5
# Every term of the loss at once: tempered KL up to the teacher's length, cross-entropy before and beyond it, and
# heavier answers. Chunks of 50 tokens do not divide the 128 of a micro-batch.
LOSS = dict(hylo_kl_weight=0.7, hylo_ce_weight=0.3, hylo_temperature=2.0, hylo_kl_chunk=50, hylo_teacher_length=40,
            hylo_ce_beyond_teacher=0.5, hylo_answer_weight=0.1)  # fmt: skip
SCHEDULE = dict(train_iters=STEPS, lr=1e-3, min_lr=1e-4, weight_decay=0.01)
UNSTEADY = ("seconds", "memory_gib")  # fields of a log's line that no two runs share


def stream(*seed) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32("/".join(map(str, seed)).encode()))


class SeededWeights:
    """Weights under Hugging Face names, for ``megatron_tensors``; large enough that every part shows in the loss."""

    def __init__(self, arch: hylo_megatron.config.Architecture, seed: int, dtype: torch.dtype):
        self.expected, self.seed, self.most = hylo_megatron.config.shapes.hf_shapes(arch), seed, dtype

    def dtype(self, key: str) -> torch.dtype:
        return torch.float32 if key.endswith(hylo_megatron.mixers.FP32_SUFFIXES) else self.most

    def __getitem__(self, key: str) -> torch.Tensor:
        noise = stream(self.seed, key).standard_normal(self.expected[key])
        if key.endswith(hylo_megatron.mixers.FP32_SUFFIXES):
            noise = noise.clip(-1.5, 1.5) * 0.7
        elif "norm" in key:
            noise = 1 + 0.2 * noise
        else:
            noise *= 0.2 if "conv1d" in key or key.endswith("bias") else 0.1
        return torch.from_numpy(noise.astype(np.float32)).to(self.dtype(key))


def write_checkpoint(folder: Path, arch: hylo_megatron.config.Architecture, seed: int, dtype=torch.float32) -> Path:
    """A Megatron checkpoint of ``arch`` with a tokenizer."""

    def companions(hf: Path) -> None:
        hf.mkdir()
        tiny.write_tokenizer(hf, arch.vocab_size)

    tensors = hylo_megatron.convert.hf_to_megatron.megatron_tensors(arch, SeededWeights(arch, seed, dtype))
    hylo_megatron.checkpoint.folder.write_checkpoint(folder, arch, tensors, companions)
    return folder


def write_pair(folder: Path, arch: hylo_megatron.config.Architecture) -> tuple[Path, Path]:
    """A student of random weights and a teacher of its size."""
    norms = [[1.5 + i, 0.5 + i / 4] for i in range(arch.num_layers)]
    student = replace(arch, extra={"ild_norms": norms})
    teacher = replace(student.as_teacher(), mla_qk_norm=False)
    return write_checkpoint(folder / "student", student, 1), write_checkpoint(folder / "teacher", teacher, 2)


def write_data(prefix: Path, vocab_size: int) -> Path:
    """Packed sequences with a loss mask and answers that weigh more."""
    shape = SEQUENCES, helpers.SEQ + 1
    ids, answers = stream("ids").randint(3, vocab_size, shape), stream("answers").random_sample(shape) > 0.85
    learnt = stream("learnt").random_sample(shape) > np.linspace(0.1, 0.5, SEQUENCES)[:, None]
    suffixes = (".json", ".learnt.bin", ".answers.npy")
    with hylo_megatron.data.token_writer.token_files(prefix, vocab_size, suffixes) as (builder, partial):
        for row in ids:
            builder.add_document(row.astype(builder.dtype), [len(row)])
        partial[".json"].write_text(json.dumps({"vocab_size": vocab_size, "eod_id": 2, "pack_length": shape[1]}))
        partial[".learnt.bin"].write_bytes(learnt.astype(np.uint8).tobytes())
        with partial[".answers.npy"].open("wb") as file:
            np.save(file, answers.astype(np.uint8))
    return prefix


def write_world(folder: Path) -> dict[str, Path]:
    """A student of each of ``KINDS``, their teachers, and ``data``."""
    world = {"data": write_data(folder / "data", helpers.ODD_VOCAB)}
    for kind in KINDS:
        arch = tiny.hybrid(kind, vocab_size=helpers.ODD_VOCAB)
        world[kind], world[f"{kind}-teacher"] = write_pair(folder / kind, arch)
    return world


def run(world: dict[str, Path], kind: str, stage: str, layout: str, log: Path, **changes) -> list[dict]:
    """Trains, and returns the log: a line for each step."""
    processes, sizes = LAYOUTS[layout]
    flags = SCHEDULE | sizes | (LOSS if stage == "distill" else {}) | dict(hylo_log=log) | changes
    argv = helpers.train_flags(world, stage, log.parent, kind, f"{kind}-teacher", **flags)
    place = argv.index("--save")
    del argv[place : place + 2]  # nothing here reads the checkpoint
    done = helpers.train(*argv, processes=processes)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return steady(helpers.read_log(log))


def steady(lines: list[dict]) -> list[dict]:
    return [{key: value for key, value in line.items() if key not in UNSTEADY} for line in lines]


def path_of(kind: str, stage: str, layout: str) -> Path:
    return FOLDER / f"{kind}-{stage}-{layout}.json"


def write_golden(path: Path, steps: list[dict]) -> None:
    """One line a step, so that a change of one number is one line of a diff."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("[\n" + ",\n".join(json.dumps(step) for step in steps) + "\n]\n")


def numbers(step: dict) -> dict[str, float | str]:
    """All fields of a step, those of layers one by one: ``layers[2][0]``."""
    found = {key: value for key, value in step.items() if key != "layers"}
    for index, layer in enumerate(step.get("layers", ())):
        found |= {f"layers[{index}][{term}]": value for term, value in enumerate(layer)}
    return found


def differences(found: list[dict], expected: list[dict]) -> list[str]:
    """A line for each number that differs by more than ``BAR``.

    The log rounds the losses of layers to five decimals: those may also be one unit of the last decimal apart.
    """
    lines = []
    if len(found) != len(expected):
        lines.append(f"{len(found)} steps, expected {len(expected)}")
    for got, wanted in zip(map(numbers, found), map(numbers, expected), strict=False):
        for field in sorted(got.keys() | wanted.keys()):
            a, b = got.get(field, "missing"), wanted.get(field, "missing")
            same = a == b
            if isinstance(a, float) and isinstance(b, float):
                rounded = 1.01e-5 if field.startswith("layers") else 0.0
                same = abs(a - b) <= max(BAR * abs(b), rounded)
            if not same:
                lines.append(f"step {wanted['iteration']}, {field}: found {a!r}, expected {b!r}")
    return lines
