"""tools/plan_memory.py against what vLLM 0.26 reported on an H200, and its errors."""

import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LLAMA_3B = dict(
    model_type="llama", architectures=["LlamaForCausalLM"], vocab_size=128256,
    hidden_size=3072, intermediate_size=8192,
    num_hidden_layers=28, num_attention_heads=24, num_key_value_heads=8, head_dim=128, rms_norm_eps=1e-5,
    max_position_embeddings=131072, tie_word_embeddings=True, hidden_act="silu",
    rope_parameters={"rope_type": "default", "rope_theta": 500000.0},
)  # fmt: skip
MEASURED = {  # bytes given to caches; requests that fit of each length
    "hybrid": (124_263_628_800, {2048: 1713, 32768: 659, 1 << 20: 30}),
    "base": (127_116_509_184, {2048: 541, 32768: 33, 1 << 20: 1}),
}


def plan(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-W", "ignore", "tools/plan_memory.py", *map(str, arguments)], cwd=ROOT,
                          capture_output=True, text=True)  # fmt: skip


def test_what_fits_is_what_the_engine_said(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(LLAMA_3B))
    done = plan(tmp_path, "--plan", "6MLA22GDN")
    assert done.returncode == 0, done.stderr
    found = dict(zip(("hybrid", "base"), re.split("^base:", done.stdout, flags=re.M), strict=True))
    for name, (caches, requests) in MEASURED.items():
        left = float(re.search(r"left for caches +([\d.]+) GiB", found[name])[1])
        assert abs(left * 2**30 / caches - 1) < 0.02
        for length, count in requests.items():
            said = int(re.search(rf"requests of {length:,} +([\d,]+) ", found[name])[1].replace(",", ""))
            assert abs(said / count - 1) < 0.02
    assert "block                    3,776 tokens" in found["hybrid"]


def test_bad_input_is_one_line(tmp_path):
    done = plan(tmp_path)
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1 and "config.json is missing" in done.stderr
