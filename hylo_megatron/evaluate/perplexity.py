"""Perplexity per token and loss by position, without ever holding the logits of a whole sequence.

Shapes: B documents, S tokens, D model width, T scored tokens of a batch, N vocabulary,
K buckets of positions. In sums over documents D is their number.
"""

import math
import time
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hylo_megatron.data.documents import read_texts
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.encoding import encode_open
from hylo_megatron.evaluate.intervals import bootstrap
from hylo_megatron.evaluate.models import check_logits, rows_per_batch

IGNORED = -100
FIRST_BUCKET = 128  # tokens; buckets double from there


def encode_documents(
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    context: int,
    max_tokens: int,
    whole: bool = False,
    form: str | None = None,
) -> list[list[int]]:
    """Return token ids of documents in file order, each cut to ``context``, until ``max_tokens`` can be scored.

    ``whole``: complete documents, in windows of ``context``. The first token of a document or a window is not scored
    (for a document it is BOS if the tokenizer adds one). ``form``: the file's format; None: as its contents say.
    """
    documents, left = [], max_tokens
    for text in read_texts(Path(file), tokenizer, form=form):
        ids = _encode_start(tokenizer, text, 2 * (left + context) if whole else min(context, left + 1))
        for start in range(0, len(ids) - 1, context):
            documents.append(ids[start : start + min(context, left + 1)])
            left -= len(documents[-1]) - 1
            if left <= 0:
                return documents
    if not documents:
        raise HyLoError(f"{file} holds no document of two tokens or more: nothing to score")
    return documents


def encode_long_documents(
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    context: int,
    count: int,
    join: bool = False,
    form: str | None = None,
    advice: str = "--long-context, or --long-join",
) -> list[list[int]]:
    """Return the first ``context`` ids of the first ``count`` documents that have as many, in file order.

    ``join``: documents that are too short are continued with the next ones, after an empty line. If the file has fewer
    long documents, all are returned. Raises ``HyLoError`` if it has none; ``advice`` names the flag of ``context``.
    """
    documents, begun = [], []
    for text in read_texts(Path(file), tokenizer, form=form):
        if begun:
            begun += encode_open(tokenizer, "\n\n" + text, special=False)
        elif join or 4 * len(text) >= context:  # a token has a byte of UTF-8 or more: others are too short
            begun = _encode_start(tokenizer, text, context)
        if len(begun) >= context:
            documents.append(begun[:context])
        if len(begun) >= context or not join:
            begun = []
        if len(documents) == count:
            break
    if not documents:
        raise HyLoError(f"{file} holds no document of {context:,} tokens: give longer ones, or a smaller {advice}")
    return documents


def _encode_start(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """Return the first ``count`` ids of a text that may be far longer."""
    chars = 8 * count
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)  # a chat template has written BOS
    while True:
        ids = encode_open(tokenizer, text[:chars], special=not begun)
        if chars >= len(text) or len(ids) > count + 8:  # the last ids depend on where the text was cut
            return ids[:count]
        chars *= 4


def batches(documents: list[list[int]], model: PreTrainedModel, batch_size: int | None) -> Iterator[list[list[int]]]:
    """Yield batches, longest documents first: rows have nearly one length, and memory peaks at the start."""
    ordered = sorted(documents, key=len, reverse=True)
    while ordered:
        rows = rows_per_batch(model, len(ordered[0]), batch_size)
        yield ordered[:rows]
        ordered = ordered[rows:]


def padded(rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return rows of ids as one tensor [B,S], padded on the right with ``IGNORED``."""
    return pad_sequence([torch.tensor(ids) for ids in rows], batch_first=True, padding_value=IGNORED)


def token_losses(model: PreTrainedModel, ids_BS: torch.Tensor, chunk: int, prefill: int | None = None) -> torch.Tensor:
    """Return the negative log likelihood (nats, float32) of tokens 1.. of every row, [B,S-1]; 0 for ``IGNORED`` ids.

    Rows are padded on the right. No token depends on later ones, so padding needs no mask. ``prefill``: positions that
    one forward pass reads; the cache carries the rest, so activations of a whole document never exist at once. Raises
    ``HyLoError`` for a model that changes the logits behind its head.
    """
    check_logits(model.config)
    length = ids_BS.shape[1]
    prefill = min(prefill or length, length)
    head, losses, past = model.get_output_embeddings(), [], None
    for start in range(0, length - 1, prefill):
        piece_BS = ids_BS[:, start : start + prefill].clamp_min(0)
        out = model.base_model(input_ids=piece_BS, past_key_values=past, use_cache=prefill < length)
        past, targets_BS = out.past_key_values, ids_BS[:, start + 1 : start + 1 + prefill]
        hidden_TD = out.last_hidden_state[:, : targets_BS.shape[1]].flatten(0, 1)
        parts = zip(hidden_TD.split(chunk), targets_BS.flatten().split(chunk), strict=True)
        found = [
            F.cross_entropy(head(h_TD).float(), target_T, ignore_index=IGNORED, reduction="none")
            for h_TD, target_T in parts
        ]
        losses.append(torch.cat(found).view(len(ids_BS), -1))
    return torch.cat(losses, 1)


def bucket_edges(context: int) -> list[int]:
    """Return 0, 128, 256, 512, ... up to ``context``."""
    edges, edge = [0], FIRST_BUCKET
    while edge < context:
        edges.append(edge)
        edge *= 2
    return [*edges, context]


def _buckets(values_BS: torch.Tensor, edges: list[int]) -> torch.Tensor:
    """Return the sums over each bucket of positions, [B,K] float64; ``values_BS`` may end before the last bucket."""
    values_BS = values_BS.double().cpu()
    return torch.stack([values_BS[:, start:end].sum(1) for start, end in pairwise(edges)], 1)


def _by_position(loss_DK: torch.Tensor, count_DK: torch.Tensor, edges: list[int]) -> list[dict]:
    """Return the mean loss of the tokens at positions ``from`` <= p < ``to`` of their documents.

    ``low`` to ``high`` is the 95 % interval over documents.
    """
    rows = []
    for bucket, (start, end) in enumerate(pairwise(edges)):
        reached = count_DK[:, bucket] > 0
        loss_D, count_D = loss_DK[reached, bucket], count_DK[reached, bucket]
        if tokens := int(count_D.sum()):
            low, high = bootstrap(loss_D, count_D)
            loss = loss_D.sum().item() / tokens
            rows.append({"from": start, "to": end, "tokens": tokens, "loss": loss, "low": low, "high": high})
    return rows


def perplexity_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    *,
    context: int = 2048,
    max_tokens: int = 20_000,
    whole: bool = False,
    form: str | None = None,
    **scoring,
) -> dict:
    """Measure the perplexity per token of a text file with documents cut to ``context``.

    ``whole``: complete documents, in windows of ``context``. ``form``: the file's format; None: as its contents say.
    ``scoring``: further arguments of ``score``, whose result is returned. A file with less text than ``max_tokens`` is
    scored as a whole, and a line says so.
    """
    if context < 2 or max_tokens < 1:
        raise HyLoError(f"context {context} and {max_tokens} tokens to score: expected at least 2 and 1")
    documents = encode_documents(tokenizer, file, context, max_tokens, whole, form)
    _say_if_fewer(file, sum(len(ids) - 1 for ids in documents), max_tokens, "tokens")
    return score(model, documents, file, **scoring)


def long_documents_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    *,
    context: int = 32_768,
    count: int = 4,
    join: bool = False,
    form: str | None = None,
    **scoring,
) -> dict:
    """Measure the loss of the first ``context`` tokens of ``count`` documents that are at least that long.

    ``join``: shorter documents are joined. ``scoring``: further arguments of ``score``, whose results are returned.
    """
    if context < 2 or count < 1:
        raise HyLoError(f"long context {context} and {count} long documents: expected at least 2 and 1")
    documents = encode_long_documents(tokenizer, file, context, count, join, form)
    _say_if_fewer(file, len(documents), count, f"documents of {context:,} tokens")
    return score(model, documents, file, **scoring)


def _say_if_fewer(file: str | Path, found: int, wanted: int, what: str) -> None:
    if found < wanted:
        print(f"{Path(file).name}: {found:,} {what} are scored, not {wanted:,}: the file has no more", flush=True)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    documents: list[list[int]],
    file: str | Path,
    batch_size: int | None = None,
    chunk: int = 1024,
    label: str = "",
    prefill: int | None = None,
) -> dict:
    """Compute the losses of ``documents``, the token ids of ``file``.

    ``chunk``: positions whose logits exist at a time. ``prefill``: positions that one forward pass reads. Returns
    perplexity and its 95 % interval over documents (``low`` to ``high``), loss (nats per token), tokens and documents
    scored, by_position, document_losses (tokens and summed loss of each document, longest first) and seconds.
    """
    began = shown = time.perf_counter()
    edges, total = bucket_edges(max(map(len, documents))), sum(len(ids) - 1 for ids in documents)
    losses, counts, scored = [], [], 0
    for batch in batches(documents, model, batch_size):
        ids_BS = padded(batch)
        found_BS = token_losses(model, ids_BS.to(model.device), chunk, prefill)
        losses.append(_buckets(F.pad(found_BS, (1, 0)), edges))  # position 0 is not scored
        counts.append(_buckets(F.pad(ids_BS[:, 1:] != IGNORED, (1, 0)), edges))
        scored += int(counts[-1].sum())
        if label and (time.perf_counter() - shown > 10 or scored == total):
            shown = time.perf_counter()
            print(f"{label}: {scored}/{total} tokens, {shown - began:.0f} s", flush=True)
    loss_DK, count_DK = torch.cat(losses), torch.cat(counts)
    loss = loss_DK.sum().item() / total
    if not math.isfinite(loss):
        raise HyLoError(f"the loss on {file} is not a finite number: the weights are broken or overflow in this dtype")
    loss_D, count_D = loss_DK.sum(1), count_DK.sum(1)
    low, high = bootstrap(loss_D, count_D)
    return {
        "perplexity": math.exp(loss),
        "low": math.exp(low),
        "high": math.exp(high),
        "loss": loss,
        "tokens": total,
        "documents": len(documents),
        "by_position": _by_position(loss_DK, count_DK, edges),
        "document_losses": [[int(n), round(x, 4)] for n, x in zip(count_D.tolist(), loss_D.tolist(), strict=True)],
        "seconds": round(time.perf_counter() - began, 2),
    }
