"""Continuous batching on one device: every step feeds each row its next token, and finished rows give way to new ones.

A prompt is fed token by token like the text behind it. A step therefore always has one shape, which a CUDA graph
replays, and no row waits for another. The price is a step for each token of a prompt.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hylo_megatron.errors import HyLoError
from hylo_megatron.kernels import draw
from hylo_megatron.sample.row_cache import row_cache, use_rows

STEPS_BETWEEN = 16  # steps between two looks at which rows are finished; a finished row idles half as many
CPU_ROWS, MOST_ROWS = 8, 2048
MEMORY_SHARE = 0.8  # of the free memory; the rest is for activations and fragments
LOGIT_BYTES = 8  # for each row and token of the vocabulary: bf16 logits and their copies


class Request(NamedTuple):
    """A row to write. ``ids``: its prompt, at least one token."""

    row: int
    ids: tuple[int, ...]


class Written(NamedTuple):
    """A finished row. ``ids``: tokens behind the prompt, without the one that ended it. ``ended``: there was one."""

    row: int
    ids: list[int]
    ended: bool


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How tokens are drawn. ``length``: most tokens of a row with its prompt. ``ends``: ids that end a row."""

    temperature: float
    top_p: float
    length: int
    seed: int
    ends: frozenset[int]


def rows_by_memory(free: int, cache_bytes_per_token: int, length: int, vocabulary: int) -> int:
    """Return how many rows of ``length`` tokens fit into ``free`` bytes, as a multiple of 64 where there are as many.

    Raises ``HyLoError`` if none fits.
    """
    rows = int(MEMORY_SHARE * free) // (cache_bytes_per_token * length + LOGIT_BYTES * vocabulary)
    if rows < 1:
        raise HyLoError(f"no memory for one row of --length {length} ({free / 2**30:.1f} GiB free): use a smaller one")
    return min(rows - rows % 64 or rows, MOST_ROWS)


def end_mask(model: PreTrainedModel, sampling: Sampling) -> Tensor:
    """Return for each id of the vocabulary whether it ends a row."""
    ends = torch.zeros(model.get_output_embeddings().weight.shape[0], dtype=torch.bool, device=model.device)
    ends[sorted(sampling.ends)] = True
    return ends


def prompt_rows(requests: list[Request], length: int) -> Tensor:
    """Return the prompts as rows of ``length`` ids, zeros behind each."""
    rows = torch.zeros(len(requests), length, dtype=torch.int64)
    for row, request in zip(rows, requests, strict=True):
        row[: len(request.ids)] = torch.tensor(request.ids)
    return rows


class Decoder:
    """``rows`` rows of a model that are written at once, each at a position of its own."""

    def __init__(self, model: PreTrainedModel, sampling: Sampling, rows: int, graph: bool = True):
        self.model, self.sampling, self.device = use_rows(model, sampling.length), sampling, model.device
        self.graph: torch.cuda.CUDAGraph | None = None
        self.wants_graph = graph and self.device.type == "cuda"
        self.draw = drawing(self.device)

        def zeros(*shape: int, dtype=torch.int64) -> Tensor:
            return torch.zeros(*shape, dtype=dtype, device=self.device)

        self.tokens = zeros(rows, sampling.length)
        self.position, self.prompt, self.row = zeros(rows), zeros(rows), zeros(rows)
        self.live, self.ended = zeros(rows, dtype=torch.bool), zeros(rows, dtype=torch.bool)
        self.ends = end_mask(model, sampling)
        self.cache = row_cache(model.config.num_hidden_layers, sampling.length, self.position)

    @torch.inference_mode()
    def write(self, requests: Iterable[Request]) -> Iterator[Written]:
        """Yield every request's row, in the order in which rows finish.

        Rows are given away while the GPU computes the next steps, so what is done with them costs no time there.
        """
        waiting, finished = iter(requests), []
        owners: list[Request | None] = [None] * len(self.position)
        while True:
            self._fill(owners, waiting)
            busy = any(owners)
            for _ in range(STEPS_BETWEEN if busy else 0):
                self._step()
            yield from finished
            if not busy:
                return
            finished = list(self._finished(owners))

    def _fill(self, owners: list[Request | None], waiting: Iterator[Request]) -> None:
        """Give idle rows the next requests."""
        slots = [slot for slot, owner in enumerate(owners) if owner is None]
        new = dict(zip(slots, waiting, strict=False))
        if not new:
            return
        for slot, request in new.items():
            owners[slot] = request
        at = torch.tensor(list(new), device=self.device)
        self.tokens[at] = prompt_rows(list(new.values()), self.sampling.length).to(self.device)
        self.prompt[at] = torch.tensor([len(request.ids) for request in new.values()], device=self.device)
        self.row[at] = torch.tensor([request.row for request in new.values()], device=self.device)
        self.position[at] = 0
        self.live[at], self.ended[at] = True, False

    def _finished(self, owners: list[Request | None]) -> Iterator[Written]:
        live, ended, position = self.live.tolist(), self.ended.tolist(), self.position.tolist()
        slots = [slot for slot, owner in enumerate(owners) if owner and not live[slot]]
        for slot, ids in zip(slots, self.tokens[slots].tolist() if slots else (), strict=True):
            owner, owners[slot] = owners[slot], None
            yield Written(owner.row, ids[len(owner.ids) : position[slot] + (not ended[slot])], ended[slot])

    def _step(self) -> None:
        if not self.wants_graph:
            self._advance()
            return
        if self.graph is None:
            self.graph = self._captured()
        self.graph.replay()

    def _captured(self) -> torch.cuda.CUDAGraph:
        """Return the graph of a step. The steps before the capture change nothing, because no row is live then."""
        live, self.live = self.live, torch.zeros_like(self.live)
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(2):
                self._advance()
        torch.cuda.current_stream().wait_stream(stream)
        self.live = live
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._advance()
        return graph

    def _advance(self) -> None:
        """Feed every row its token, and write the next one behind it: the prompt's, or a drawn one."""
        sampling = self.sampling
        ids = self.tokens.gather(1, self.position[:, None])
        out = self.model(
            input_ids=ids, position_ids=self.position[:, None], past_key_values=self.cache, use_cache=True
        )
        uniform = draw.uniforms(sampling.seed, self.row, self.position)
        drawn = self.draw(out.logits[:, -1], uniform, sampling.temperature, sampling.top_p)
        following = (self.position + 1).clamp_max(sampling.length - 1)
        prompted = following < self.prompt
        kept = self.tokens.gather(1, following[:, None])[:, 0]
        token = torch.where(prompted | ~self.live, kept, drawn)
        self.tokens.scatter_(1, following[:, None], token[:, None])
        ended = self.live & ~prompted & self.ends[token]
        full = self.live & ~prompted & (following == sampling.length - 1)
        self.position.copy_(torch.where(self.live, following, self.position))
        self.ended.logical_or_(ended)
        self.live.logical_and_(~(ended | full))


def drawing(device: torch.device):
    """Return the function that draws tokens on ``device``: the Triton kernel where it gives the reference's tokens."""
    if device.type != "cuda":
        return draw.draw
    from hylo_megatron import packages

    if not packages.has("triton"):
        return draw.draw
    from hylo_megatron.kernels import triton_draw

    logits = 3 * torch.randn(64, 9000, generator=torch.Generator().manual_seed(0)).to(device)
    uniform = draw.uniforms(0, torch.arange(64, device=device), torch.zeros(64, dtype=torch.int64, device=device))
    same = [
        (triton_draw.draw(logits, uniform, 0.8, top_p) == draw.draw(logits, uniform, 0.8, top_p)).float().mean().item()
        for top_p in (0.9, 1.0)
    ]
    if min(same) < 0.95:  # a sum rounded otherwise moves a draw that falls between two tokens
        raise HyLoError(
            f"the kernel that draws tokens agrees with its reference in {100 * min(same):.0f} % of draws, expected 95:"
            " report this GPU and triton's version, and use --engine vllm"
        )
    return triton_draw.draw
