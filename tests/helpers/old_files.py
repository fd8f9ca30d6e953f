"""``tests/golden/old``: checkpoints and exports that every later release has to read.

``python -m helpers.old_files KIND`` (with the repository and ``tests`` in PYTHONPATH) writes ``old/KIND``. Run it for
a new kind of linear block only: files that the code of the day has just written say nothing about old ones.

- ``gdn/checkpoint``: a release checkpoint in bf16, as upcycle.py leaves it.
- ``mamba2/checkpoint``: the same after two steps of training in fp32, with the optimizer's state.
- ``KIND/export``: the Hugging Face folder of that checkpoint.
- ``KIND/expected.json``: logits of a prompt in fp32, and the log's line of the next training step.
"""

import json
import shutil
import sys
import tempfile
from pathlib import Path

import torch
import transformers
from helpers import golden_runs as golden
from helpers import tiny
from helpers import train as helpers
from helpers.paths import ROOT

import hylo_megatron.config
import hylo_megatron.convert.megatron_to_hf
import hylo_megatron.hf  # noqa: F401  registers the model
import hylo_megatron.init.upcycle

OLD = ROOT / "tests" / "golden" / "old"
VOCAB, STEPS_BEFORE = 48, {"gdn": 0, "mamba2": 2}
PROMPT = [3, 14, 15, 9, 26, 5, 35, 8, 9, 7, 9, 32]
GEOMETRY = hylo_megatron.config.Geometry(
    hylo_megatron.config.MLAGeometry(8, 4, 4, 8),
    hylo_megatron.config.GDNGeometry(1, 2, 8, 8),
    hylo_megatron.config.Mamba2Geometry(2, 8, 8, 2),
)


def architecture(kind: str) -> hylo_megatron.config.Architecture:
    return tiny.hybrid(vocab_size=VOCAB, hidden_size=16, intermediate_size=16, num_attention_heads=2,
                       num_key_value_heads=1, head_dim=8, plan=("mla", kind), geometry=GEOMETRY)  # fmt: skip


def write_world(folder: Path, kind: str) -> dict[str, Path]:
    """The teacher of an old checkpoint, and data."""
    dtype = torch.float32 if STEPS_BEFORE[kind] else torch.bfloat16
    teacher = golden.write_checkpoint(folder / "teacher", architecture(kind).as_teacher(), 3, dtype)
    return {"teacher": teacher, "data": golden.write_data(folder / "data", VOCAB)}


def train(world: dict[str, Path], student: Path, save: Path, steps: int) -> list[dict]:
    """Train until step ``steps``, on from what ``save`` holds; returns the log."""
    flags = golden.SCHEDULE | golden.LOSS | dict(exit_interval=steps)
    done = helpers.train(*helpers.train_flags(world, "distill", save, str(student), **flags))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return golden.steady(helpers.read_log(save / "train_log.jsonl"))


def next_step(world: dict[str, Path], checkpoint: Path, work: Path) -> list[dict]:
    """Take one step from an old checkpoint, with the optimizer's state if it has one; returns the log."""
    kind = checkpoint.parent.name
    if STEPS_BEFORE[kind]:
        shutil.copytree(checkpoint, work)
        (work / "train_log.jsonl").unlink(missing_ok=True)
    return train(world, checkpoint, work, STEPS_BEFORE[kind] + 1)


@torch.no_grad()
def logits(folder: Path, **options) -> list[list[float]]:
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options).eval()
    return model(torch.tensor([PROMPT])).logits[0].tolist()


def make(kind: str, work: Path) -> None:
    world, folder = write_world(work, kind), OLD / kind
    words = torch.from_numpy(golden.stream("calibration").randint(3, VOCAB, (4, helpers.SEQ)))
    student = work / "student"
    hylo_megatron.init.upcycle.upcycle(world["teacher"], student, ("mla", kind), geometry=GEOMETRY, tokens_BS=words)
    checkpoint = student
    if STEPS_BEFORE[kind]:
        checkpoint = work / "trained"
        train(world, student, checkpoint, STEPS_BEFORE[kind])
    folder.mkdir(parents=True)
    shutil.copytree(checkpoint, folder / "checkpoint")
    hylo_megatron.convert.megatron_to_hf.convert(folder / "checkpoint", folder / "export")
    (line,) = next_step(world, folder / "checkpoint", work / "next")
    rows = ",\n  ".join(map(json.dumps, logits(folder / "export")))
    (folder / "expected.json").write_text(f'{{"step": {json.dumps(line)},\n "logits": [\n  {rows}\n ]}}\n')


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as scratch:
        make(sys.argv[1], Path(scratch))
