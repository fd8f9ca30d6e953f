"""Attention within a window (``window.py``) for requests whose keys and values have places of fixed number.

A request has S places of sinks, by position, and then a ring: the token at position t stands at place S + t mod W. The
position tells which places hold tokens of the request, so that no place is ever cleared. ``TokenPlan`` and
``ChunkPlan`` have what all layers of a pass share. No function here waits for the GPU, and shapes depend on lengths
that the host knows.

Legend: R requests, T new tokens, H query heads, G key heads, K head dim, Y = 2 K (keys beside values), S sinks,
W window, C places or keys, M places of a cache's slots, N blocks, L queries of a block.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from hylo_megatron.config.window import ALIGNMENT, blocks

QUERIES = 256  # of a block, at most
ROWS = 1 << 16  # keys that are read at once: many short prompts take the memory that a long one takes
KERNELS = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]  # cuDNN's makes a new plan for every number of blocks


@dataclass(frozen=True, kw_only=True)
class TokenPlan:
    """One new token a request: its place, and the places that the token sees."""

    sinks: int
    slot_R: Tensor
    place_R: Tensor
    row_RC: Tensor
    mask: Tensor  # [R, 1, H / G, C]

    @classmethod
    def of(cls, at_R: Tensor, slot_R: Tensor, window: dict, *, shared: int, dtype: torch.dtype) -> "TokenPlan":
        """Plan for tokens at positions ``at``. ``slot``: where a request's places are. ``shared``: H / G."""
        size, sinks = window["size"], window["sinks"]
        count = sinks + size
        at_R1, row_C = at_R[:, None], torch.arange(count + -count % ALIGNMENT, device=at_R.device)
        place_R1 = torch.where(at_R1 < sinks, at_R1, sinks + at_R1 % size)
        held_RC = _held(row_C, at_R1, size, sinks)
        seen_RC = (held_RC <= at_R1) & ((row_C < sinks) | (held_RC >= sinks)) & (row_C < count)
        return cls(
            sinks=sinks,
            slot_R=slot_R.long().clamp(min=0),  # padding of a CUDA graph may be -1
            place_R=place_R1.squeeze(1),
            row_RC=torch.where(seen_RC, row_C, place_R1),  # what others left may be no numbers
            mask=_mask(seen_RC[:, None, None], shared, dtype),
        )

    def attend(self, q_RHK: Tensor, far_RHK: Tensor, kv_RGY: Tensor, cache_MGCY: Tensor) -> Tensor:
        """Write the tokens' keys and values into ``cache``, and return the attention ``[R, H, K]``."""
        cache_MGCY[self.slot_R, :, self.place_R] = kv_RGY.to(cache_MGCY.dtype)
        outs = []
        for q, far, slot_R, row_RC, mask in _parts(self.row_RC, q_RHK, far_RHK, self.slot_R, self.row_RC, self.mask):
            rows_RGCY = _rows(cache_MGCY, slot_R, row_RC).to(q.dtype)
            outs.append(_attend(q.unsqueeze(1), far.unsqueeze(1), rows_RGCY, mask, self.sinks).squeeze(1))
        return torch.cat(outs)


@dataclass(frozen=True, kw_only=True)
class ChunkPlan:
    """Chunks of any lengths, in blocks of queries that belong to one request each."""

    sinks: int
    slot_R: Tensor
    slot_N: Tensor
    fresh_RC: Tensor  # places that a new token takes
    source_RC: Tensor  # and which
    token_NL: Tensor  # the queries of a block
    new_NC: Tensor  # new tokens among the keys of a block
    is_old_NC: Tensor  # keys that stand in the ring
    old_NC: Tensor  # and where
    sink_NS: Tensor
    mask: Tensor  # [N, 1, (H / G) L, S + C]
    out_T: Tensor  # where a token's output is among those of all blocks

    @classmethod
    def of(
        cls, at_T: Tensor, starts: Tensor, slot_R: Tensor, window: dict, *, shared: int, dtype: torch.dtype
    ) -> "ChunkPlan":
        """Plan for tokens at positions ``at``; request r has those from ``starts[r]`` to ``starts[r + 1]``."""
        size, sinks, tokens, device = window["size"], window["sinks"], len(at_T), at_T.device
        cut = blocks(min(-(-tokens // len(slot_R)), QUERIES), size, sinks)  # short prompts have short blocks
        starts, slot_R = starts.long(), slot_R.long().clamp(min=0)
        length_R, begin_R = starts.diff(), starts[:-1]
        first_R = at_T[begin_R.clamp(max=tokens - 1)]
        # blocks: every request has whole ones; those at the end that none has are left to the last request
        blocks_R = (length_R + cut.length - 1) // cut.length
        ends_R = blocks_R.cumsum(0)
        block_N = torch.arange(tokens // cut.length + len(slot_R), device=device)
        request_N = torch.searchsorted(ends_R, block_N, right=True).clamp(max=len(slot_R) - 1)
        offset_N1 = ((block_N - (ends_R - blocks_R)[request_N]) * cut.length)[:, None]
        begin_N1, length_N1, first_N1 = (x[request_N][:, None] for x in (begin_R, length_R, first_R))
        query_NL = offset_N1 + torch.arange(cut.length, device=device)
        key_NC = offset_N1 + torch.arange(-cut.before, cut.length, device=device)
        key_at_NC, query_at_NL1 = first_N1 + key_NC, (first_N1 + query_NL)[..., None]
        is_new_NC = (key_NC >= 0) & (key_NC < length_N1)
        is_old_NC = (key_NC < 0) & (key_NC >= -size) & (key_at_NC >= sinks)
        # what a query sees
        distance = query_at_NL1.int() - key_at_NC[:, None].int()
        seen = ((is_new_NC & (key_at_NC >= sinks)) | is_old_NC)[:, None] & (distance >= 0) & (distance < size)
        sink_S = torch.arange(sinks, device=device)
        seen = torch.cat([sink_S <= query_at_NL1, seen], -1) | (query_NL >= length_N1)[..., None]
        # what the ring and the sinks hold afterwards
        last_R1 = (first_R + length_R - 1)[:, None]
        held_RC = _held(torch.arange(sinks + size, device=device), last_R1, size, sinks)
        # where each token's output is
        request_T = torch.searchsorted(starts[1:], torch.arange(tokens, device=device), right=True)
        request_T = request_T.clamp(max=len(slot_R) - 1)
        inside_T = torch.arange(tokens, device=device) - begin_R[request_T]
        block_T = (ends_R - blocks_R)[request_T] + inside_T // cut.length
        return cls(
            sinks=sinks,
            slot_R=slot_R,
            slot_N=slot_R[request_N],
            fresh_RC=(held_RC >= first_R[:, None]) & (held_RC <= last_R1),
            source_RC=(begin_R[:, None] + held_RC - first_R[:, None]).clamp(0, tokens - 1),
            token_NL=(begin_N1 + query_NL).clamp(max=tokens - 1),
            new_NC=(begin_N1 + key_NC).clamp(0, tokens - 1),
            is_old_NC=is_old_NC,
            old_NC=sinks + key_at_NC % size,
            sink_NS=torch.where(sink_S <= last_R1[request_N], sink_S, 0),
            mask=_mask(seen[:, None], shared, dtype),
            out_T=block_T * cut.length + inside_T % cut.length,
        )

    def attend(self, q_THK: Tensor, far_THK: Tensor, kv_TGY: Tensor, cache_MGCY: Tensor) -> Tensor:
        """Keep the last keys and values and the first ones in ``cache``, and return the attention ``[T, H, K]``."""
        self._keep(kv_TGY, cache_MGCY, slice(self.sinks))
        each = self.slot_N, self.token_NL, self.new_NC, self.is_old_NC, self.old_NC, self.sink_NS, self.mask
        outs = []
        for slot_N, token_NL, new_NC, is_old_NC, old_NC, sink_NS, mask in _parts(self.new_NC, *each):
            old_NGCY = _rows(cache_MGCY, slot_N, old_NC).to(kv_TGY.dtype)
            rows_NGCY = torch.where(is_old_NC[:, None, :, None], old_NGCY, kv_TGY[new_NC].transpose(1, 2))
            rows_NGCY = torch.cat([_rows(cache_MGCY, slot_N, sink_NS).to(kv_TGY.dtype), rows_NGCY], 2)
            outs.append(_attend(q_THK[token_NL], far_THK[token_NL], rows_NGCY, mask, self.sinks))
        self._keep(kv_TGY, cache_MGCY, slice(self.sinks, None))  # only now: the blocks read what stood in the ring
        return torch.cat(outs).flatten(0, 1)[self.out_T]

    def _keep(self, kv_TGY: Tensor, cache_MGCY: Tensor, places: slice) -> None:
        """Write new tokens into ``places`` of all requests."""
        fresh_RC, source_RC = self.fresh_RC[:, places], self.source_RC[:, places]
        for slot_R, fresh, source in _parts(source_RC, self.slot_R, fresh_RC, source_RC):
            new_RGCY = kv_TGY[source].transpose(1, 2).to(cache_MGCY.dtype)
            kept_RGCY = cache_MGCY[slot_R, :, places]
            cache_MGCY[slot_R, :, places] = torch.where(fresh[:, None, :, None], new_RGCY, kept_RGCY)


def _parts(keys_NC: Tensor, *each: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield slices of all tensors along N, of at most ``ROWS`` keys."""
    most = max(1, ROWS // max(1, keys_NC.shape[1]))
    return zip(*(x.split(most) for x in each), strict=True)


def _held(row_C: Tensor, last_R1: Tensor, size: int, sinks: int) -> Tensor:
    """Return the position whose token is at each place when ``last`` is the last one; below 0 where none is."""
    return torch.where(row_C < sinks, row_C, last_R1 - (last_R1 - (row_C - sinks)) % size)


def _mask(seen: Tensor, shared: int, dtype: torch.dtype) -> Tensor:
    """Return what is added to scores ``[.., queries, keys]``, for ``shared`` heads after another."""
    mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, -torch.inf)
    return mask.repeat(1, 1, shared, 1)


def _rows(cache_MGCY: Tensor, slot_R: Tensor, row_RC: Tensor) -> Tensor:
    """Return the places ``row`` of the slots, ``[R, G, C, Y]``."""
    head_G = torch.arange(cache_MGCY.shape[1], device=row_RC.device)
    return cache_MGCY[slot_R[:, None, None], head_G[:, None], row_RC[:, None]]


def _attend(q_NLHK: Tensor, far_NLHK: Tensor, rows_NGCY: Tensor, mask: Tensor, sinks: int) -> Tensor:
    """Return ``[N, L, H, K]``. The first ``sinks`` keys meet ``far``, all others ``q``.

    Both queries stand beside one another, each over zeros of the other's keys, so that fused kernels can run.
    """
    heads, width, groups = q_NLHK.shape[2], q_NLHK.shape[3], rows_NGCY.shape[1]
    q = torch.cat([q_NLHK, far_NLHK], -1).unflatten(2, (groups, -1)).permute(0, 2, 3, 1, 4).flatten(2, 3)
    keys = F.pad(rows_NGCY[..., :width], (0, width))
    keys[:, :, :sinks] = keys[:, :, :sinks].roll(width, -1)
    with sdpa_kernel(KERNELS):
        out = F.scaled_dot_product_attention(q, keys, rows_NGCY[..., width:], mask, scale=width**-0.5)
    return out.unflatten(2, (heads // groups, -1)).permute(0, 3, 1, 2, 4).flatten(2, 3)
