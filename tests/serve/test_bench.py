"""tools/bench/serve.py on a CPU: everything that it measures, for small models."""

import json
import os
import subprocess
import sys

import pytest
from helpers.paths import ROOT

SCRIPT = ROOT / "tools" / "bench" / "serve.py"
ENGINE = json.dumps(dict(max_num_batched_tokens=2048, max_num_seqs=4, enforce_eager=True, gpu_memory_utilization=0.2))


@pytest.mark.slow
def test_hybrid_and_base_side_by_side(tmp_path):
    models = ["hybrid", "hybrid-torch", "base"]
    arguments = ["--shape", "tiny", "--plan", "2MLA2GDN", "--lengths", "64", "2000000", "--concurrent", "32x2", "32x6",
                 "--window", "16+2", "--models", *models, "--rates", "1e12", "1e10", "--profile",
                 "--engine", ENGINE]  # fmt: skip
    env = {**os.environ, "VLLM_CPU_KVCACHE_SPACE": "1"}
    done = subprocess.run(
        [sys.executable, SCRIPT, "--out", tmp_path, *arguments], env=env, capture_output=True, text=True
    )
    logs = [path.read_text()[-3000:] for path in tmp_path.glob("*/log.txt")]
    assert done.returncode == 0, done.stderr + "\n".join(logs)
    result = json.loads((tmp_path / "serve.json").read_text())["models"]
    assert list(result) == models
    for name, found in result.items():
        expected = ["engine", "latency", "too long", "throughput", "throughput", "profile", "profile"]
        assert [line["what"] for line in found] == expected, logs
        engine, latency, long, two, six, prompt, token = found
        assert engine["tokens"]["2048"] > 2048 and long["fits"] < 2000000
        assert latency["first_token"] > latency["floor"]["first_token"] > 0
        assert latency["per_token"] > latency["floor"]["per_token"] > 0
        assert two["tokens_per_s"] == pytest.approx(2 * (32 + 65) / two["seconds"])
        # four run at once, and are done when the others' prompts are
        assert two["decoded"] == six["decoded"] == 2 * 64 and six["decoded_per_s"] > six["decoded"] / six["seconds"]
        assert prompt["kernels_ms"] > 0 and token["step_ms"] > 0
        assert f"{name} 2,000,000: does not fit" in done.stdout
    assert (tmp_path / "serve.png").exists() or "no serve.png: matplotlib is needed" in done.stdout


@pytest.mark.parametrize(("arguments", "says"), [
    (["--concurrent", "2048"], "invalid pair value: '2048'"),
    (["--models", "hybrid-torch"], "--models hybrid-torch: expected --window with it"),
    ([], "required: --out"),
    (["--engine", '{"no_such_argument": 1}'], "hybrid ended with 1: "),
])  # fmt: skip
def test_bad_input_gets_a_line(tmp_path, arguments, says):
    given = ["--shape", "tiny", "--plan", "2MLA2GDN", "--rates", "1e12", "1e10", "--models", "hybrid", *arguments]
    given += ["--out", tmp_path] if arguments else []
    done = subprocess.run([sys.executable, SCRIPT, *given], capture_output=True, text=True)
    assert done.returncode and says in done.stderr and "Traceback" not in done.stderr
