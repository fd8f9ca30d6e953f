"""Greedy tokens from vLLM, in a process of its own: ``python generate.py SPEC.json`` prints a line of JSON.

SPEC: {"model": DIR, "prompts": [[token, ...], ...], "tokens": N, "poison": bool, "engine": {LLM's arguments}}. It
answers with each prompt's tokens and their log probabilities; with ``poison`` twice, NaN in every cache in between.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

CPU = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "HF_HUB_OFFLINE": "1",
       "VLLM_NO_USAGE_STATS": "1"}  # fmt: skip


def generate(work: Path, model: Path, prompts: list[list[int]], tokens: int, poison=False, env=(), **engine) -> dict:
    """``{"answers": [[(token, log probability), ...] for each prompt], "again": the same or None, "log": str}``."""
    done = start(work, model, prompts, tokens, poison, env, **engine)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    answer = next(line for line in done.stdout.splitlines() if line.startswith('{"answers"'))  # vLLM logs there too
    return json.loads(answer) | {"log": done.stdout + done.stderr}


def start(work: Path, model: Path, prompts: list, tokens: int, poison=False, env=(), **engine):
    spec = work / f"{model.name}.json"
    spec.write_text(json.dumps(dict(model=str(model), prompts=prompts, tokens=tokens, poison=poison, engine=engine)))
    return subprocess.run([sys.executable, __file__, str(spec)], env={**os.environ, **CPU, **dict(env)},
                          capture_output=True, text=True, timeout=900)  # fmt: skip


def main(spec: dict) -> None:
    from vllm import LLM, SamplingParams

    llm = LLM(model=spec["model"], seed=0, **spec["engine"])
    sampling = SamplingParams(temperature=0, max_tokens=spec["tokens"], ignore_eos=True, logprobs=0)

    def answers() -> list:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in spec["prompts"]], sampling, use_tqdm=False)
        texts = [output.outputs[0] for output in outputs]
        return [[(k, step[k].logprob) for k, step in zip(t.token_ids, t.logprobs, strict=True)] for t in texts]

    first, again = answers(), None
    if spec["poison"]:
        engine = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        for layer in engine.values():
            for cache in layer.kv_cache if isinstance(layer.kv_cache, list | tuple) else [layer.kv_cache]:
                cache.fill_(float("nan"))
        again = answers()
    print(json.dumps({"answers": first, "again": again}), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
