"""Measure one model for tools/bench/serve.py in a process of its own, with random weights.

FOLDER has config.json and spec.json; measured.jsonl is written there.
"""

import json
import sys
import time
from pathlib import Path

DECODED = 65


class Engine:
    def __init__(self, folder: Path, options: dict):
        from vllm import LLM

        started = time.perf_counter()
        self.llm = LLM(
            model=str(folder), load_format="dummy", skip_tokenizer_init=True, max_model_len=-1, seed=0,
            enable_prefix_caching=False, **options,
        )  # fmt: skip
        self.load_seconds, self.count = time.perf_counter() - started, 0
        self.longest = self.llm.llm_engine.model_config.max_model_len  # the model's limit, or what fits into memory

    def run(self, prompts: list[int], tokens: int) -> tuple[float, float, int]:
        """Run ``prompts`` (lengths) and measure the time to first tokens and the time of decoding.

        Returns the seconds until all prompts have their first token, the seconds from there to the last token, and the
        tokens decoded in those. Prompts that started early have more tokens at that point, or are complete.
        """
        from vllm import SamplingParams

        engine = self.llm.llm_engine
        sampling = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        waiting, decoded, early = set(), {}, 0
        for length in prompts:
            self.count += 1
            waiting.add(str(self.count))
            ids = [3 + (i * 7919 + self.count) % 500 for i in range(length)]
            engine.add_request(str(self.count), {"prompt_token_ids": ids}, sampling)
        started, first = time.perf_counter(), None
        while engine.has_unfinished_requests():
            for output in engine.step():
                waiting.discard(output.request_id)
                decoded[output.request_id] = len(output.outputs[0].token_ids)
            if first is None and not waiting:
                first, early = time.perf_counter(), sum(decoded.values())
        return first - started, time.perf_counter() - first, sum(decoded.values()) - early

    def profile(self, length: int, steps: int = 16) -> list[dict]:
        """Profile a prompt of ``length`` and a decoded token after it: ms of each kernel."""
        from vllm import SamplingParams

        engine, tokens = self.llm.llm_engine, 0
        sampling = SamplingParams(temperature=0, max_tokens=2 * steps, ignore_eos=True, detokenize=False)
        engine.add_request("profile", {"prompt_token_ids": [3 + i % 500 for i in range(length)]}, sampling)

        def until(count: int) -> None:
            nonlocal tokens
            while tokens < count:
                tokens = max([tokens, *(len(output.outputs[0].token_ids) for output in engine.step())])

        found = [dict(of="prompt", length=length, **traced(lambda: until(1), 1))]
        until(steps // 2)  # decoding has begun
        found.append(dict(of="token", length=length, **traced(lambda: until(steps + steps // 2), steps)))
        until(2 * steps)
        return found

    def caches(self) -> dict:
        """Return vLLM's blocks, and the tokens that fit when all requests have one length."""
        config = self.llm.llm_engine.engine_core.engine_core.scheduler.kv_cache_config
        bytes_ = sum(tensor.size for tensor in config.kv_cache_tensors)
        found = {"cache_bytes": bytes_, "blocks": config.num_blocks, "tokens": {}}
        for length in (2048, 32768, 1 << 20):
            blocks = 0
            for group in config.kv_cache_groups:
                state = "Mamba" in type(group.kv_cache_spec).__name__
                blocks += 1 if state else -(-length // group.kv_cache_spec.block_size)
            requests = (config.num_blocks - 1) // blocks
            found["tokens"][length] = requests * length
            found.setdefault("bytes_per_token", {})[length] = bytes_ / max(1, requests * length)
            found.setdefault("requests", {})[length] = requests
        found["block_size"] = [g.kv_cache_spec.block_size for g in config.kv_cache_groups]
        return found


def traced(run, steps: int) -> dict:
    """Return the ms per step of each kernel, and of the clock."""
    import torch

    activities = torch.profiler.ProfilerActivity
    device, spent = (activities.CUDA, "device") if torch.cuda.is_available() else (activities.CPU, "cpu")
    with torch.profiler.profile(activities=[device]) as profile:
        started = time.perf_counter()
        run()
        seconds = time.perf_counter() - started
    found = [(event, getattr(event, f"self_{spent}_time_total") / steps / 1e3) for event in profile.key_averages()]
    each = {event.key: [event.count / steps, ms] for event, ms in sorted(found, key=lambda pair: -pair[1])}
    return dict(step_ms=1e3 * seconds / steps, kernels_ms=sum(ms for _, ms in each.values()), kernels=each)


def main(folder: Path, spec: dict) -> None:
    """Write a line of JSON for each measurement as soon as it is made."""

    def say(**values) -> None:
        with (folder / "measured.jsonl").open("a") as file:
            print(json.dumps(values), file=file)

    engine = Engine(folder, spec["engine"])
    say(what="engine", load_seconds=engine.load_seconds, **engine.caches())
    engine.run([spec["lengths"][0]], DECODED)  # compiles the remaining kernels
    for length in spec["lengths"]:
        if length + DECODED > engine.longest:
            say(what="too long", length=length, fits=engine.longest)
            continue
        first, rest, _ = engine.run([length], DECODED)
        say(what="latency", length=length, first_token=first, per_token=rest / (DECODED - 1))
    for length, requests in spec["concurrent"]:
        engine.run([length] * min(requests, 16), 8)  # compiles kernels of steps that read prompts and decode together
        first, rest, decoded = engine.run([length] * requests, DECODED)
        total = requests * (length + DECODED)
        speeds = dict(tokens_per_s=total / (first + rest), decoded=decoded, decoded_per_s=decoded / rest)
        say(what="throughput", length=length, requests=requests, seconds=first + rest, **speeds)
    if spec["profile"]:
        for found in engine.profile(spec["lengths"][0]):
            say(what="profile", **found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads((Path(sys.argv[1]) / "spec.json").read_text()))
