"""The GPU recipe's own stages at toy size, on a CPU, through the whole runner: killed in the middle, and resumed."""

import functools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace

import pytest

from hylo_megatron.capabilities import has

if not has("megatron-core"):
    pytest.skip("megatron-core is not installed", allow_module_level=True)
import tiny  # noqa: E402
import train_helpers as helpers  # noqa: E402

from hylo_megatron.data.prepare import prepare  # noqa: E402
from hylo_megatron.errors import HyLoError  # noqa: E402
from hylo_megatron.recipes.proxy import write_tokenizer  # noqa: E402
from hylo_megatron.recipes.smollm2 import smollm2_cpu, smollm2_gpu  # noqa: E402
from hylo_megatron.recipes.stage import Evaluation  # noqa: E402
from hylo_megatron.run.background import Background  # noqa: E402

SHORT = {2048: 512, 8192: 640, 32768: 768}  # retrieval samples need 512 tokens
STEPS = 6

# Runs the recipe in folder argv[1]; imported by path, so that a killed run and a whole one are the same program.
PROGRAM = """
import sys
sys.path[:0] = sys.argv[2:]
import test_recipes
from pathlib import Path
from hylo_megatron.run.recipe_run import Run
from hylo_megatron.run.launch import Processes

if __name__ == "__main__":
    Run(test_recipes.toy_recipe(), Path(sys.argv[1]), Processes.found()).execute()
"""


def toy_recipe():
    """``smollm2_gpu`` with every length and count made small; nothing else is changed."""
    recipe = smollm2_gpu()
    stages = tuple(
        replace(
            stage, seq_length=SHORT[stage.seq_length], steps=STEPS, micro_batch=1, global_batch=2,
            teacher_length=stage.teacher_length and 384,
        )
        for stage in recipe.stages
    )  # fmt: skip
    evaluation = Evaluation(128, 600, (256,), 1, 2, long_context=512, long_documents=1)
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


def start(out, program) -> subprocess.Popen:
    command = [sys.executable, str(program), str(out), str(helpers.ROOT), str(helpers.ROOT / "tests")]
    return subprocess.Popen(command, env=helpers.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                            text=True, start_new_session=True)  # fmt: skip


def losses(out, stage: str) -> list[tuple]:
    return [
        (line["iteration"], line["loss"], line["grad_norm"])
        for line in helpers.read_log(out / stage / "train_log.jsonl")
    ]


def wait_for_step(log, step: int, process) -> None:
    deadline = time.time() + 300
    while time.time() < deadline and process.poll() is None:
        if log.is_file() and any(json.loads(line)["iteration"] >= step for line in log.read_text().splitlines()):
            return
        time.sleep(0.05)
    raise AssertionError(f"{log} never came to step {step}")


def test_every_stage_of_the_gpu_recipe_and_a_kill(tmp_path):
    program, whole, killed = tmp_path / "run.py", tmp_path / "whole", tmp_path / "killed"
    program.write_text(PROGRAM)
    write_inputs(whole)
    process = start(whole, program)
    printed = process.communicate(timeout=900)[0]
    assert process.returncode == 0, printed[-3000:]
    names = [stage.name for stage in toy_recipe().stages]
    assert [name for name in names if f"after {name}" in printed] == names
    assert "| needles found | 256 |" in printed
    assert "(whole) the student" not in printed
    assert {"evaluation.md", "evaluation.json", "run.md"} <= {path.name for path in (whole / "report").iterdir()}

    # the same again, its third stage killed after the checkpoint at step 3
    shutil.copytree(whole, killed, ignore=shutil.ignore_patterns(
        "distill-8k", "distill-32k", "hf-distill-*k", "eval-distill-*k.json", "sample.json", "report"
    ))  # fmt: skip
    shutil.copytree(whole / "hf-distill-2k", killed / "hf-distill-2k")
    shutil.copy(whole / "eval-distill-2k.json", killed)
    process = start(killed, program)
    wait_for_step(killed / "distill-8k" / "train_log.jsonl", 4, process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    subprocess.run(["pkill", "-9", "-f", f"hylo_megatron.train.*{killed}"], check=False)
    process = start(killed, program)
    printed = process.communicate(timeout=900)[0]
    assert process.returncode == 0, printed[-3000:]
    assert "distill-2k: done before" in printed
    for name in names:
        assert losses(killed, name) == losses(whole, name), name
        assert [line[0] for line in losses(whole, name)] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("beside", [False, True], ids=["at once", "beside"])
def test_work_in_the_background(tmp_path, beside):
    background = Background(tmp_path, beside)
    background.start("good", functools.partial(print, "done"))
    background.wait()
    assert (tmp_path / "good.log").read_text() == "done\n"
    error, message = (HyLoError, "bad failed: ZeroDivisionError") if beside else (ZeroDivisionError, "by zero")
    with pytest.raises(error, match=message):
        background.start("bad", functools.partial(divmod, 1, 0))
        background.wait("bad")


def test_recipes_are_declared_as_the_readme_says():
    gpu, cpu = smollm2_gpu(), smollm2_cpu()
    assert sum(stage.tokens for stage in gpu.stages) <= 30e6
    assert [stage.seq_length for stage in gpu.stages] == [2048, 2048, 8192, 32768]
    assert [stage.kind for stage in cpu.stages] == ["ild", "distill"]
    for recipe in (gpu, cpu):
        for stage in recipe.stages:
            assert not stage.mix or sum(share for _, share in stage.mix) == pytest.approx(1)
            assert stage.global_batch % stage.micro_batch == 0
