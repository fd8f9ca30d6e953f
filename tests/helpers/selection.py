"""Two teachers that differ in one layer, and calls of ``hylo select-layers``."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import tiny
from safetensors.torch import load_file, save_file

from hylo_megatron.data.token_writer import token_files
from hylo_megatron.select import command

LENGTH, SAMPLES = 32, 6
MATTERS = {"teacher": 1, "other": 3}  # of 4 layers; a blind choice of one is 0, a uniform one 2
CPU = torch.device("cpu")


def silence(source: Path, folder: Path, kept: tuple[int, ...] = ()) -> None:
    """Copy a model with the output projections of mixers set to zero, except those of the layers ``kept``."""
    shutil.copytree(source, folder)
    state = load_file(folder / "model.safetensors")
    for name, tensor in state.items():
        if name.endswith(".o_proj.weight") and int(name.split(".")[2]) not in kept:
            tensor.zero_()
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


@torch.no_grad()
def write_samples(prefix: Path, model) -> None:
    """Write rows as retrieval samples; the last 8 tokens, which are marked, are what ``model`` expects there."""
    rows, answers = tiny.tokens(SAMPLES, LENGTH, seed=3), np.zeros((SAMPLES, LENGTH), np.uint8)
    answers[:, -8:] = 1
    for place in range(LENGTH - 8, LENGTH):
        rows[:, place] = model(rows[:, :place]).logits[:, -1].argmax(-1)
    with token_files(prefix, tiny.VOCAB, (".answers.npy", ".json")) as (builder, partial):
        for row in rows.numpy():
            builder.add_document(row, [LENGTH])
        with partial[".answers.npy"].open("wb") as file:
            np.save(file, answers)
        summary = {"dtype": builder.dtype.__name__, "sequences": SAMPLES, "pack_length": LENGTH}
        partial[".json"].write_text(json.dumps(summary))


def flags(world, out, *more, method="smart", budget=("--mla", 1)) -> list[str]:
    """Return the flags of a selection. ``more`` overrides earlier ones."""
    given = ["--method", method, "--teacher", world / "teacher", "--out", out, *budget]
    if method not in command.FIXED:
        given += ["--text", world / "text.jsonl", "--tokens", 256, "--length", LENGTH]
        given += ["--window", "4+1"] if method == "window" else ["--student", world / "student"]
    return [str(flag) for flag in (*given, *more)]


def select(world, out, *more, **settings) -> dict:
    command.main(flags(world, out, *more, **settings))
    return json.loads((out / "plan.json").read_text())


def refused(capsys, *arguments, **settings) -> str:
    with pytest.raises(SystemExit):
        command.main(flags(*arguments, **settings))
    (error,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("error: "))
    return error
