"""The same rows from vLLM's offline engine, for models that ``decoder`` refuses, hybrids among them."""

import itertools
from collections.abc import Iterable, Iterator
from pathlib import Path

from hylo_megatron import packages
from hylo_megatron.sample.decoder import Request, Sampling, Written

ROWS = 256  # rows that vLLM runs at once, unless --batch-size says otherwise
WAITING = 4  # times as many are given to it at once, so that a finished row gives way to another


class VllmEngine:
    """Each row has a generator of its own in vLLM, seeded by the run's seed and the row."""

    def __init__(self, folder: Path, sampling: Sampling, dtype: str, rows: int | None):
        self.vllm = packages.load("vllm", "hylo sample-text --engine vllm")
        self.sampling = sampling
        self.rows = rows or ROWS
        self.engine = self.vllm.LLM(
            str(folder), dtype=dtype, seed=sampling.seed, max_model_len=sampling.length, enable_prefix_caching=False,
            max_num_seqs=self.rows,
        )  # fmt: skip

    def write(self, requests: Iterable[Request]) -> Iterator[Written]:
        """Yield every request's row."""
        waiting = iter(requests)
        while part := list(itertools.islice(waiting, WAITING * self.rows)):
            prompts = [{"prompt_token_ids": list(request.ids)} for request in part]
            answers = self.engine.generate(prompts, [self._parameters(request) for request in part], use_tqdm=False)
            for request, answer in zip(part, answers, strict=True):
                ids = list(answer.outputs[0].token_ids)
                end = next((at for at, token in enumerate(ids) if token in self.sampling.ends), None)
                yield Written(request.row, ids[:end], end is not None)

    def _parameters(self, request: Request):
        sampling = self.sampling
        return self.vllm.SamplingParams(
            temperature=sampling.temperature, top_p=sampling.top_p, max_tokens=sampling.length - len(request.ids),
            seed=(sampling.seed * 1_000_003 + request.row) % 2**31, stop_token_ids=sorted(sampling.ends),
            detokenize=False,
        )  # fmt: skip
