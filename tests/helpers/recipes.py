"""The GPU recipe with every length and count made small, the files that it starts from, and its runs."""

import json
import random
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

from helpers import tiny
from helpers.paths import PROGRAMS
from helpers.train import environment, read_log
from helpers.waits import lines_of, wait_for

from hylo_megatron.data.prepare import prepare
from hylo_megatron.recipes.proxy import write_tokenizer
from hylo_megatron.recipes.smollm2 import smollm2_gpu
from hylo_megatron.recipes.stage import Evaluation

SHORT = {2048: 512, 8192: 640, 32768: 768}  # retrieval samples need 512 tokens
STEPS = 6
PROGRAM = PROGRAMS / "toy_recipe.py"


def toy_recipe():
    """``smollm2_gpu`` with every length and count made small, and a stage that reads its own student's text."""
    recipe = smollm2_gpu()
    stages = tuple(
        replace(
            stage, seq_length=SHORT[stage.seq_length], steps=STEPS, micro_batch=1, global_batch=2,
            teacher_length=stage.teacher_length and 384, on_policy=0.2 if stage.name == "distill-2k" else 0.0,
        )
        for stage in recipe.stages
    )  # fmt: skip
    evaluation = Evaluation(
        context=128, tokens=600, needle_lengths=(256,), needle_samples=1, needle_depths=2, long_context=512,
        long_documents=1,
    )  # fmt: skip
    return replace(recipe, plan="0,3", layers=4, stages=stages, calibration_tokens=1024, calibration_length=128,
                   evaluation=evaluation, save_every=3)  # fmt: skip


def sentences(count: int, rng: random.Random) -> str:
    words = [
        a + b + c for a in ("ba", "lo", "ri", "tu", "me") for b in ("n", "st", "v") for c in ("er", "al", "or", "i")
    ]
    return " ".join(" ".join(rng.choices(words, k=9)).capitalize() + "." for _ in range(count))


def write_inputs(out, layers: int = 4) -> None:
    """What a run would fetch: a model with its tokenizer, text to train on, text to judge by."""
    rng = random.Random(1)
    texts = [sentences(rng.randint(20, 400), rng) for _ in range(60)]
    (out / "text").mkdir(parents=True)
    (out / "data").mkdir()
    size = write_tokenizer(out / "text", texts)
    model = tiny.teacher_model("llama", vocab_size=size, eos_token_id=2, max_position_embeddings=1024,
                               num_hidden_layers=layers)  # fmt: skip
    tiny.save_model(model, out / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.move(out / "text" / name, out / "hf" / name)
    for name, documents in (
        ("train", texts),
        *((f"eval_{kind}", texts[:8]) for kind in ("prose", "code", "c", "long")),
    ):
        lines = "".join(json.dumps({"text": text}) + "\n" for text in documents)
        (out / "text" / f"{name}.jsonl").write_text(lines)
    (out / "text" / "SOURCES.md").write_text("made by a test\n")
    prepare([out / "text" / "train.jsonl"], out / "hf", out / "data" / "train")


def held(stage: str, step: int) -> dict[str, str]:
    """Return variables with which a training goes no further than ``step``, so that it can be killed there."""
    return {"HYLO_TEST_HOLD": f"{stage} {step}", "PYTHONPATH": str(PROGRAMS / "hold")}


def start(out, **variables: str) -> subprocess.Popen:
    command = [sys.executable, str(PROGRAM), str(out)]
    return subprocess.Popen(command, env=environment(**variables), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)  # fmt: skip


def losses(out, stage: str) -> list[tuple]:
    return [(line["iteration"], line["loss"], line["grad_norm"]) for line in read_log(out / stage / "train_log.jsonl")]


def wait_for_step(log: Path, step: int, process: subprocess.Popen) -> None:
    wait_for(lambda: lines_of(log) >= step, f"step {step} in {log}", process=process)
