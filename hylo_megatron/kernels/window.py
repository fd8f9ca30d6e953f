"""Softmax attention over the last tokens and the first ones (sinks, arXiv 2309.17453), in blocks of queries.

A block of queries reads the keys of its own span and of the window before it, and the sinks. Memory and work grow with
T (2 W + S) for T tokens, and shapes are fixed by the lengths, as CUDA graphs need. Query heads of a group that share a
key head become further queries of one head, so that keys are not repeated.

Distances to sinks count no further than ``W + S - 1``: a text of any length has the distances of a short one. Queries
are therefore rotated twice, for the window and, at a position of at most ``W + S - 1``, for the sinks.

Legend: B rows, A rows of a mask, Q queries, T keys (the queries are the last Q of their tokens), H query heads, G key
heads, R = H / G, K head dim, Y = 2 K, W window, S sinks, N blocks, L queries of a block, C keys of a block.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from hylo_megatron.config.window import Blocks, blocks

PADDING = -1  # the position of a token that no query sees


def far_positions(at: Tensor, window: dict) -> Tensor:
    """Return the positions at which queries meet the sinks. ``window``: ``Window`` of ``config/positions.py``."""
    return at.clamp(max=window["size"] + window["sinks"] - 1)


def window_mask(
    at_BT: Tensor, sink_at_BS: Tensor, queries: int, window: dict, *, shared: int, dtype: torch.dtype
) -> Tensor:
    """Return what ``window_attention`` adds to scores, ``[B N, 1, R L, C]``: 0, or -inf for keys that are not seen.

    ``at_BT`` and ``sink_at_BS``: positions of the tokens, ``PADDING`` for none; tokens before position ``sinks`` are
    sinks. A query at ``PADDING`` sees itself, so that no row is empty. ``shared``: query heads of a key head, R.
    """
    cut = blocks(queries, window["size"], sink_at_BS.shape[1])
    at = _read(at_BT.int(), queries, cut, PADDING)
    query_BNL1 = at[:, cut.before :].unflatten(1, (cut.count, cut.length)).unsqueeze(-1)
    key_BN1C = at.unfold(1, cut.before + cut.length, cut.length).unsqueeze(2)
    sink_B11S = sink_at_BS[:, None, None]
    distance = query_BNL1 - key_BN1C
    seen = (key_BN1C >= window["sinks"]) & (distance >= 0) & (distance < window["size"])
    own = torch.ones(seen.shape[-2:], dtype=torch.bool, device=at.device).tril(cut.before).triu(cut.before)
    seen = seen | (own & (query_BNL1 == PADDING))
    seen = torch.cat([(sink_B11S >= 0) & (sink_B11S <= query_BNL1), seen], -1)
    mask = torch.zeros(seen.shape, dtype=dtype, device=at.device).masked_fill_(~seen, -torch.inf)
    return mask.flatten(0, 1).repeat(1, shared, 1).unsqueeze(1)


def window_attention(
    q_BQHK: Tensor, far_BQHK: Tensor, kv_BTGY: Tensor, sinks_BSGY: Tensor, mask: Tensor, window: dict
) -> Tensor:
    """Return ``[B, Q, H, K]``. ``kv`` and ``sinks``: keys beside values. ``mask`` is ``window_mask``'s.

    ``far`` are the queries that meet the sinks. Both stand beside one another, each over zeros of the other's keys.
    A mask of A rows serves B rows: the first B / A of them share its first row, and so on. Heads of rows that share a
    mask become heads of one row, so that the mask is not repeated.
    """
    rows, queries, heads, width = q_BQHK.shape
    groups, cut = kv_BTGY.shape[2], blocks(queries, window["size"], sinks_BSGY.shape[1])
    apart = len(mask) // cut.count
    q = _padded(torch.cat([q_BQHK, far_BQHK], -1), (0, cut.count * cut.length - queries), 0.0)
    q = q.unflatten(1, (cut.count, cut.length)).unflatten(3, (groups, -1)).permute(0, 1, 3, 4, 2, 5)
    (k, v), (sink_k, sink_v) = (x.chunk(2, -1) for x in (kv_BTGY, sinks_BSGY))
    near = _read(torch.cat([k, torch.zeros_like(k), v], -1), queries, cut, 0.0)
    near = near.unfold(1, cut.before + cut.length, cut.length).transpose(-1, -2)
    far = torch.cat([torch.zeros_like(sink_k), sink_k, sink_v], -1).transpose(1, 2).unsqueeze(1)
    keys = torch.cat([_sharing(x, apart) for x in (far.expand(-1, cut.count, -1, -1, -1), near)], 4)
    parts = (_sharing(q, apart).flatten(4, 5), *keys.split([2 * width, width], -1))
    parts = (part.flatten(2, 3).flatten(0, 1) for part in parts)
    out = F.scaled_dot_product_attention(*parts, mask, scale=width**-0.5)
    out = out.unflatten(2, (heads // groups, cut.length)).unflatten(1, (-1, groups)).unflatten(0, (apart, -1))
    return out.permute(0, 2, 1, 5, 3, 4, 6).reshape(rows, -1, heads, width)[:, :queries]


def sequence_mask(q_BSHK: Tensor, groups: int, window: dict) -> Tensor:
    """Return the mask of complete sequences, which all rows share."""
    _, length, heads, _ = q_BSHK.shape
    at_1S = torch.arange(length, device=q_BSHK.device)[None]
    return window_mask(at_1S, at_1S[:, : window["sinks"]], length, window, shared=heads // groups, dtype=q_BSHK.dtype)


def sequence_attention(
    q_BSHK: Tensor, far_BSHK: Tensor, k_BSGK: Tensor, v_BSGK: Tensor, window: dict, mask: Tensor | None = None
) -> Tensor:
    """Return the attention ``[B, S, H, K]`` of complete sequences within the window."""
    kv = torch.cat([k_BSGK, v_BSGK], -1)
    mask = sequence_mask(q_BSHK, kv.shape[2], window) if mask is None else mask
    return window_attention(q_BSHK, far_BSHK, kv, kv[:, : window["sinks"]], mask, window)


def _sharing(x_BN: Tensor, apart: int) -> Tensor:
    """``[B, N, ..] -> [A, N, B / A, ..]`` for a mask of A = ``apart`` rows."""
    return x_BN.unflatten(0, (apart, -1)).transpose(1, 2)


def _read(x_BT: Tensor, queries: int, cut: Blocks, value: float) -> Tensor:
    """Return the tokens that any block reads: earlier ones are cut off, missing ones on both sides are ``value``."""
    return _padded(x_BT, (cut.before - (x_BT.shape[1] - queries), cut.count * cut.length - queries), value)


def _padded(x_BT: Tensor, edges: tuple[int, int], value: float) -> Tensor:
    return F.pad(x_BT, (0, 0) * (x_BT.dim() - 2) + edges, value=value) if any(edges) else x_BT
