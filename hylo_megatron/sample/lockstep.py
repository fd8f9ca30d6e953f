"""Rows of a hybrid, written in batches that begin and end together.

The caches of a hybrid hold states of one length for all rows, so a row that has ended cannot give way to another one
before its whole batch is finished. A prompt is fed token by token like the text behind it.
"""

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hylo_megatron.kernels import draw
from hylo_megatron.sample.decoder import STEPS_BETWEEN, Request, Sampling, Written, drawing, end_mask, prompt_rows


def cache_bytes_per_token(model: PreTrainedModel, length: int) -> int:
    """Return the bytes of a row's cache for each of ``length`` tokens. States and full windows are shared out."""
    read = min((model.config.window or {"size": 1})["size"], length)
    full, longer = (_cache_bytes(model, tokens) for tokens in (read, read + 1))
    return math.ceil((full + (longer - full) * (length - read)) / length)


@torch.inference_mode()
def _cache_bytes(model: PreTrainedModel, tokens: int) -> int:
    ids = torch.zeros(1, tokens, dtype=torch.int64, device=model.device)
    return model(input_ids=ids, use_cache=True).past_key_values.num_bytes()


class LockstepDecoder:
    """``rows`` rows of a hybrid at once. Each row has the tokens that it would have alone, except for rounding."""

    def __init__(self, model: PreTrainedModel, sampling: Sampling, rows: int):
        self.model, self.sampling, self.rows, self.device = model, sampling, rows, model.device
        self.draw = drawing(self.device)
        self.ends = end_mask(model, sampling)

    def write(self, requests: Iterable[Request]) -> Iterator[Written]:
        """Yield the row of every request, in order."""
        waiting = iter(requests)
        while batch := list(itertools.islice(waiting, self.rows)):
            yield from self._batch(batch)

    @torch.inference_mode()
    def _batch(self, requests: list[Request]) -> list[Written]:
        padded = requests + requests[-1:] * (self.rows - len(requests))  # kernels round by the size of a batch
        tokens = prompt_rows(padded, self.sampling.length).to(self.device)
        prompt = torch.tensor([len(request.ids) for request in padded], device=self.device)
        row = torch.tensor([request.row for request in padded], device=self.device)
        live = torch.ones(self.rows, dtype=torch.bool, device=self.device)
        last, cache = torch.zeros_like(row), None
        for at in range(self.sampling.length - 1):
            out = self.model(input_ids=tokens[:, at : at + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            drawn = self._drawn(out.logits[:, -1], row, at)
            writes = live & (at + 1 >= prompt)
            tokens[:, at + 1] = torch.where(writes, drawn, tokens[:, at + 1])
            last = torch.where(live, at + 1, last)
            live = live & ~(writes & self.ends[drawn])
            if at % STEPS_BETWEEN == 0 and not live.any():
                break
        found = zip(requests, tokens.tolist(), last.tolist(), (~live).tolist(), strict=False)
        return [
            Written(request.row, ids[len(request.ids) : end + (not ended)], ended)
            for request, ids, end, ended in found
        ]

    def _drawn(self, logits: Tensor, row: Tensor, at: int) -> Tensor:
        uniform = draw.uniforms(self.sampling.seed, row, torch.full_like(row, at))
        return self.draw(logits, uniform, self.sampling.temperature, self.sampling.top_p)
