"""vLLM in bf16 on a GPU against transformers.

``PYTHONPATH=.:tests python tests/serve/parity_gpu.py WORK [CASE ...] [--engine JSON]``

CASE: the folder of an exported model, or geometry:linear[:WORD ...] for random weights with settings that ``WORDS``
has: norms, rope, nope, window, narrow. Cases of kda need vLLM 0.32. A model with windows runs twice: the Triton kernel
decodes its windows, then torch code. For each run the share of 64 x 64 greedy tokens that are transformers' (fp32,
same rounded weights; and bf16), or within 1e-3 of it in log probability, and that share for transformers' own bf16:
close calls any bf16 loses, and random weights have many.
"""

import argparse
import json
import statistics
from dataclasses import replace
from pathlib import Path

import torch
from helpers.paths import ROOT
from helpers.serving import GEOMETRIES, log_probabilities, prompt, write_folder
from programs.generate import generate

from hylo_megatron.config import GDNGeometry
from hylo_megatron.hf import HyLoForCausalLM
from hylo_megatron.mixers.kda.geometry import KDAGeometry

LENGTHS = [1, 2, 5, 63, 64, 65, 129, 1000, 4095, 4097, 7900, 20000, *(37 * i % 1900 + 1 for i in range(52))]
TOKENS, TIE = 64, 1e-3
# Heads as the native geometry has them for 128-wide attention: FlashInfer's kernel for prompts takes these.
GEOMETRIES["native-128"] = replace(GEOMETRIES["native"], gdn=GDNGeometry(3, 6, 128, 128),
                                   kda=KDAGeometry(6, 128))  # fmt: skip
WORDS = {
    "norms": dict(qk_norm=True), "rope": dict(linear_rope=True), "nope": dict(mla_rope=False),
    "window": dict(window=dict(size=256, sinks=4), num_key_value_heads=2),
    "narrow": dict(window=dict(size=37, sinks=0), num_key_value_heads=1),
}  # fmt: skip
ENGINE = dict(dtype="bfloat16", max_num_seqs=16, max_num_batched_tokens=4096, gpu_memory_utilization=0.3,
              kv_cache_memory_bytes=8 << 30)  # fmt: skip


def behind(expected: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """By how much each token's log probability lies below the best one's."""
    chosen = expected.gather(1, torch.tensor(tokens, device=expected.device)[:, None])[:, 0]
    return (expected.max(-1).values - chosen).cpu()


def text_prompts(folder: Path, longest: int) -> list[list[int]]:
    """Passages of this repository, one for each length that the model takes."""
    from transformers import AutoTokenizer

    files = sorted(path for kind in ("docs/*.md", "hylo_megatron/**/*.py") for path in ROOT.glob(kind))
    ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(path.read_text() for path in files)).input_ids
    return [ids[997 * i : 997 * i + n] for i, n in enumerate(n for n in LENGTHS if n + TOKENS <= longest)]


def random_case(work: Path, case: str) -> tuple[Path, list[list[int]]]:
    geometry, linear, *words = case.split(":")
    settings = {name: value for word in words for name, value in WORDS[word].items()}
    folder = write_folder(work / case.replace(":", "-"), geometry, linear, dtype=torch.bfloat16, **settings)
    return folder, [prompt(length, i) for i, length in enumerate(LENGTHS)]


def compare(work: Path, folder: Path, prompts: list, decodes: str | None, poison: bool, engine: dict) -> None:
    """Print how vLLM's tokens compare. ``decodes``: what attends within windows, ``HYLO_SERVE_WINDOW``."""
    env = {"VLLM_USE_FLASHINFER_SAMPLER": "0"} | ({"HYLO_SERVE_WINDOW": decodes} if decodes else {})
    got = generate(work, folder, prompts, TOKENS, poison=poison, env=env, **ENGINE | engine)
    prompts, answers = prompts * (1 + poison), got["answers"] + (got["again"] or [])
    exact, half = (HyLoForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval()
                   for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
    gaps = {"vllm, of fp32": [], "vllm, of bf16": [], "transformers' bf16, of fp32": []}
    for given, answer in zip(prompts, answers, strict=True):
        tokens = [token for token, _ in answer]
        fp32, bf16 = (log_probabilities(model, given + tokens, TOKENS) for model in (exact, half))
        found = behind(fp32, tokens), behind(bf16, tokens), behind(fp32, bf16.argmax(-1).tolist())
        for each, gap in zip(gaps.values(), found, strict=True):
            each.append(gap)
    shares = {
        name: dict(agree=(torch.cat(each) <= TIE).float().mean().item(), worst=torch.cat(each).max().item())
        for name, each in gaps.items()
    }
    by_length = {
        len(p): round(statistics.mean((g <= TIE).tolist()), 2)
        for p, g in zip(prompts, gaps["vllm, of fp32"], strict=True)
    }
    title = f"{folder.name}, windows by {decodes}" if decodes else folder.name
    print(title, json.dumps(shares), json.dumps(by_length), *(x for x in got["log"].splitlines() if "HyLo:" in x),
          sep="\n  ", flush=True)  # fmt: skip


def main(work: Path, cases: list[str], twice: bool, poison: bool, engine: dict) -> None:
    work.mkdir(parents=True, exist_ok=True)
    for case in cases:
        if Path(case).is_dir():
            folder = Path(case).resolve()
            longest = json.loads((folder / "config.json").read_text())["max_position_embeddings"]
            prompts = text_prompts(folder, longest)
        else:
            folder, prompts = random_case(work, case)
            longest = 20480
        has_windows = json.loads((folder / "config.json").read_text()).get("window")
        for decodes in ("triton", "torch") if has_windows else (None,):
            compare(work, folder, prompts * (1 + twice), decodes, poison, {"max_model_len": longest} | engine)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("work", type=Path)
    parser.add_argument("cases", nargs="*", metavar="CASE",
                        default=["native:gdn", "native:kda", "native-128:gdn", "native-128:kda",
                                 "llama-1b:gdn", "llama-3b:mamba2",
                                 "qwen3-1.7b:gdn:norms", "native:gdn:window", "native:kda:narrow",
                                 "native:mamba2:window", "llama-3b:mamba2:narrow"])  # fmt: skip
    parser.add_argument("--engine", type=json.loads, default={}, help="JSON of more arguments of vllm.LLM")
    parser.add_argument("--twice", action="store_true", help="every prompt twice, for prefix caching")
    parser.add_argument("--poison", action="store_true", help="all prompts once more, after NaN in every cache")
    known = parser.parse_args()
    main(known.work, known.cases, known.twice, known.poison, known.engine)
