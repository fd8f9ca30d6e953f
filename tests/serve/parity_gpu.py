"""vLLM in bf16 on a GPU against transformers: python tests/serve/parity_gpu.py WORK [geometry:linear[:norms] ...]

For each model the share of greedy tokens that are transformers' (fp32, same rounded weights) or within 1e-3 of it in
log probability, and the same share for transformers in bf16: random weights have close calls, which any bf16 loses.
"""

import json
import statistics
import sys
from pathlib import Path

import torch
from folders import log_probabilities, prompt, write_folder
from generate import generate

from hylo_megatron.hf import HyLoForCausalLM

LENGTHS = [1, 2, 5, 63, 64, 65, 129, 1000, 4095, 4097, 20000, *(37 * i % 700 + 1 for i in range(21))]
TOKENS, TIE = 32, 1e-3
ENGINE = dict(dtype="bfloat16", max_model_len=20480, max_num_seqs=16, max_num_batched_tokens=4096,
              gpu_memory_utilization=0.5)  # fmt: skip


def behind(expected: torch.Tensor, tokens: list[int]) -> torch.Tensor:
    """By how much each token's log probability lies below the best one's."""
    chosen = expected.gather(1, torch.tensor(tokens, device=expected.device)[:, None])[:, 0]
    return (expected.max(-1).values - chosen).cpu()


def main(work: Path, cases: list[str]) -> None:
    work.mkdir(parents=True, exist_ok=True)
    prompts = [prompt(length, i) for i, length in enumerate(LENGTHS)]
    for case in cases:
        geometry, linear, *norms = case.split(":")
        folder = write_folder(work / case.replace(":", "-"), geometry, linear, bool(norms), torch.bfloat16)
        got = generate(work, folder, prompts, TOKENS, env={"VLLM_USE_FLASHINFER_SAMPLER": "0"}, **ENGINE)
        exact, half = (HyLoForCausalLM.from_pretrained(folder, dtype=dtype).cuda().eval()
                       for dtype in (torch.float32, torch.bfloat16))  # fmt: skip
        ours, theirs = [], []
        for given, answer in zip(prompts, got["answers"], strict=True):
            tokens = [token for token, _ in answer]
            expected = log_probabilities(exact, given + tokens, TOKENS)
            ours.append(behind(expected, tokens))
            theirs.append(behind(expected, log_probabilities(half, given + tokens, TOKENS).argmax(-1).tolist()))
        shares = {}
        for name, gaps in (("vllm", torch.cat(ours)), ("transformers in bf16", torch.cat(theirs))):
            shares[name] = dict(agree=(gaps <= TIE).float().mean().item(), worst=gaps.max().item())
        by_length = {n: round(statistics.mean((g <= TIE).tolist()), 2) for n, g in zip(LENGTHS, ours, strict=True)}
        print(case, json.dumps(shares), json.dumps(by_length), *(x for x in got["log"].splitlines() if "HyLo:" in x),
              sep="\n  ", flush=True)  # fmt: skip


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:] or ["native:gdn", "llama-1b:gdn", "llama-3b:mamba2", "qwen3-1.7b:gdn:norms"])
