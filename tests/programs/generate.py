"""Greedy tokens from vLLM, in a process of its own: ``python generate.py SPEC.json`` prints a line of JSON.

SPEC: {"model": DIR, "prompts": [[token, ...], ...], "tokens": N, "poison": bool, "twice": bool, "first": DIR or null,
"updates": [[HOW, DIR], ...], "engine": {LLM's arguments}}. It answers with each prompt's tokens and their log
probabilities; with ``poison`` twice, NaN in every cache in between; with ``twice`` again from cached prefixes; once
more after each update, with DIR's weights sent as HOW says, of which ``first`` is sent before everything.
"""

import ctypes
import json
import os
import random
import subprocess
import sys
from pathlib import Path

# VLLM_CPU_CI_ENV leaves vLLM's warm-up out, half of a start; test_http.py has it.
CPU = {"VLLM_CPU_CI_ENV": "1", "VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
       "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}  # fmt: skip


def generate(work: Path, model: Path, prompts: list[list[int]], tokens: int, env=(), **more) -> dict:
    """``{"answers": [[(token, log probability), ...] for each prompt], "again": the same or None, "updated": the same
    after each update, "cached": how many tokens of each prompt had been cached at the end, "log": str}``; with updates
    also what ``scored`` and ``refusals`` give."""
    done = start(work, model, prompts, tokens, env, **more)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    answer = next(line for line in done.stdout.splitlines() if line.startswith('{"answers"'))  # vLLM logs there too
    return json.loads(answer) | {"log": done.stdout + done.stderr}


def start(work: Path, model: Path, prompts: list, tokens: int, env=(), poison=False, twice=False, first=None,
          updates=(), **engine):  # fmt: skip
    from helpers.waits import PATIENCE  # which the process that is started here does not find

    spec = work / f"{model.name}.json"
    spec.write_text(json.dumps(dict(
        model=str(model), prompts=prompts, tokens=tokens, poison=poison, twice=twice, first=first and str(first),
        updates=[(how, str(folder)) for how, folder in updates], engine=engine,
    )))  # fmt: skip
    return subprocess.run([sys.executable, __file__, str(spec)], env={**os.environ, **CPU, **dict(env)},
                          capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip


def cache_prefixes() -> None:
    """Let requests of models without latents begin from cached prefixes.

    On a CPU the plugin switches them off, and vLLM has no kernel that copies states.
    """
    from vllm.v1.worker import mamba_utils

    from hylo_megatron.serve.config import EngineSettings

    settings = EngineSettings.verify_and_update_config

    def and_prefixes(vllm_config) -> None:
        settings(vllm_config)
        vllm_config.cache_config.enable_prefix_caching = True

    def copy(sources, targets, sizes) -> None:
        for source, target, size in zip(sources.tolist(), targets.tolist(), sizes.tolist(), strict=True):
            ctypes.memmove(target, source, size)

    EngineSettings.verify_and_update_config, mamba_utils.batch_memcpy = staticmethod(and_prefixes), copy


def send(llm, how: str, folder: str) -> None:
    """New weights: each tensor in a call of its own, in any order, some of them twice (``singly``); in several calls
    within an update as vLLM's weight transfer makes them (``session``); or by vLLM's own ``reload_weights``."""
    from safetensors.torch import load_file
    from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload

    items = list(load_file(Path(folder) / "model.safetensors").items())
    random.Random(0).shuffle(items)

    def singly(model) -> None:
        for item in items + items[:7]:
            model.load_weights([item])

    def session(model) -> None:
        initialize_layerwise_reload(model)
        for start in range(0, len(items), 5):
            model.load_weights(items[start : start + 5])
        finalize_layerwise_reload(model, llm.llm_engine.vllm_config.model_config)

    if how == "reload":
        llm.collective_rpc("reload_weights", kwargs=dict(weights_path=folder))
    else:
        llm.apply_model({"singly": singly, "session": session}[how])


def part_derived(model) -> None:
    """Give latent attention copies of what it derives from ``kv_b_proj``, of which vLLM mostly keeps views."""
    for module in model.modules():
        for name in ("W_UK_T", "W_UV"):
            if hasattr(module, name):
                getattr(module, name).data = getattr(module, name).data.clone()


def scored(llm, prompt: list[int]) -> dict:
    """Log probabilities of a prompt's tokens, and the best of four beams."""
    from vllm import SamplingParams
    from vllm.sampling_params import BeamSearchParams

    given = {"prompt_token_ids": prompt}
    steps = llm.generate([given], SamplingParams(max_tokens=1, prompt_logprobs=0), use_tqdm=False)[0].prompt_logprobs
    beam = llm.beam_search([given], BeamSearchParams(beam_width=4, max_tokens=6, ignore_eos=True))[0].sequences[0]
    return {
        "prompt": [step[token].logprob for token, step in zip(prompt[1:], steps[1:], strict=True)],
        "beam": beam.tokens[len(prompt) :],
        "beam_score": beam.cum_logprob,
    }


def refusals(llm) -> list[str]:
    """What is said of an update by an unknown name, and of one by another shape."""
    import torch

    said = []
    for name in ("model.layers.0.self_attn.o_proj.weight", "model.layers.1.self_attn.kv_a_proj_with_mqa.weight"):
        try:
            llm.apply_model(lambda model, name=name: model.load_weights([(name, torch.zeros(3, 5))]))
        except Exception as error:  # noqa: BLE001
            said.append(str(error))
    return said


def main(spec: dict) -> None:
    from vllm import LLM, SamplingParams

    if spec["twice"]:
        cache_prefixes()
    llm = LLM(model=spec["model"], seed=0, **spec["engine"])
    if spec["first"]:
        send(llm, "singly", spec["first"])
    sampling = SamplingParams(temperature=0, max_tokens=spec["tokens"], ignore_eos=True, logprobs=0)

    cached = []

    def answers() -> list:
        outputs = llm.generate([{"prompt_token_ids": prompt} for prompt in spec["prompts"]], sampling, use_tqdm=False)
        cached[:] = [output.num_cached_tokens for output in outputs]
        texts = [output.outputs[0] for output in outputs]
        return [[(k, step[k].logprob) for k, step in zip(t.token_ids, t.logprobs, strict=True)] for t in texts]

    first, again = answers(), None
    if spec["poison"]:
        engine = llm.llm_engine.vllm_config.compilation_config.static_forward_context
        for layer in engine.values():
            for cache in layer.kv_cache if isinstance(layer.kv_cache, list | tuple) else [layer.kv_cache]:
                cache.fill_(float("nan"))
        again = answers()
    if spec["twice"]:
        again = answers()
    updated = []
    if spec["updates"]:
        llm.apply_model(part_derived)
    for how, folder in spec["updates"]:
        send(llm, how, folder)
        updated.append(answers())
    more = {"scored": scored(llm, spec["prompts"][-2]), "refused": refusals(llm)} if updated else {}
    print(json.dumps({"answers": first, "again": again, "updated": updated, "cached": cached, **more}), flush=True)


if __name__ == "__main__":
    main(json.loads(Path(sys.argv[1]).read_text()))
