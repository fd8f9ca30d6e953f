"""``hylo sample-text`` from a hybrid, which only vLLM samples."""

import json
import os
import subprocess
import sys

from helpers.paths import ROOT
from helpers.serving import write_folder
from helpers.waits import PATIENCE
from programs.generate import CPU


def sampled(folder, out, tokens: int) -> dict[str, str]:
    command = [
        sys.executable, "-m", "hylo_megatron", "sample-text", "--teacher", folder, "--out", out, "--tokens", tokens,
        "--length", 64, "--rows-per-shard", 6, "--shortest", 1, "--batch-size", 4, "--start-token", "<s>",
    ]  # fmt: skip
    environment = os.environ | CPU | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, timeout=PATIENCE)
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name: path.read_text() for path in out.glob("*.jsonl")}


def test_a_hybrid_samples_and_goes_on(tmp_path):
    folder = write_folder(tmp_path / "hybrid", "native", "gdn")
    first = sampled(folder, tmp_path / "out", 50)
    more = sampled(folder, tmp_path / "out", 400)
    assert first.items() < more.items()
    assert sampled(folder, tmp_path / "again", 400) == more
    about = json.loads((tmp_path / "out" / "sampled.json").read_text())
    assert about["settings"]["engine"] == "vllm" and about["tokens"] >= 400
