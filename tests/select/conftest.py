"""Two teachers that differ in one layer, and a student."""

import json
from pathlib import Path

import pytest
import torch
from helpers import tiny
from helpers.selection import CPU, MATTERS, silence, write_samples

from hylo_megatron.convert import hf_to_megatron, megatron_to_hf
from hylo_megatron.evaluate.models import load
from hylo_megatron.init.upcycle import upcycle


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """``teacher`` and ``other`` attend in one layer each; linear layers of ``student`` add nothing.

    ``base`` and ``linear`` are the checkpoints before that. ``text.jsonl`` and ``samples`` are rows to measure on.
    """
    world = tmp_path_factory.mktemp("select")
    model = tiny.teacher_model("llama", tie_word_embeddings=False)
    model.lm_head.weight.data *= 3  # far from uniform, so that a loss of answers shows
    tiny.save_model(model, world / "hf")
    hf_to_megatron.convert(world / "hf", world / "base")
    upcycle(world / "base", world / "linear", ("gdn",) * 4, init="svd", log=list)
    megatron_to_hf.convert(world / "linear", world / "linear-hf")
    for name, layer in MATTERS.items():
        silence(world / "hf", world / name, kept=(layer,))
    silence(world / "linear-hf", world / "student")
    lines = [" ".join(f"w{n}" for n in row) for row in tiny.tokens(64, 40, seed=1).tolist()]
    (world / "text.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    write_samples(world / "samples", load(world / "teacher", CPU, torch.float32).model)
    return world
