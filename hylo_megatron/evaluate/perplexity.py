"""Perplexity per token and loss by position, without ever holding the logits of a whole sequence.

Shapes: B documents, S tokens, D model width, T scored tokens of a batch, N vocabulary.
"""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from hylo_megatron.data.documents import read_texts
from hylo_megatron.errors import HyLoError
from hylo_megatron.evaluate.models import rows_per_batch

IGNORED = -100
FIRST_BUCKET = 128  # tokens; buckets double from there
OTHER_HEADS = ("final_logit_softcapping", "logits_scaling", "logit_scale")


def encode_documents(tokenizer: PreTrainedTokenizerBase, file: str | Path, context: int, max_tokens: int) -> list:
    """Return token ids of documents in file order, each cut to ``context``, until ``max_tokens`` can be scored.

    The first token of a document is not scored (it is BOS if the tokenizer adds one).
    """
    documents, left = [], max_tokens
    for text in read_texts(Path(file), tokenizer):
        ids = _encode_start(tokenizer, text, min(context, left + 1))
        if len(ids) > 1:
            documents.append(ids)
            left -= len(ids) - 1
        if left <= 0:
            break
    if not documents:
        raise HyLoError(f"{file} holds no document of two tokens or more: nothing to score")
    return documents


def encode_windows(tokenizer: PreTrainedTokenizerBase, file: str | Path, context: int, max_tokens: int) -> list:
    """Return complete documents in file order as windows of ``context`` ids, until ``max_tokens`` can be scored."""
    windows, left = [], max_tokens
    for text in read_texts(Path(file), tokenizer):
        ids = _encode_start(tokenizer, text, 2 * left + 2 * context)
        for start in range(0, len(ids) - 1, context):
            windows.append(ids[start : start + min(context, left + 1)])
            left -= len(windows[-1]) - 1
            if left <= 0:
                return windows
    if not windows:
        raise HyLoError(f"{file} holds no document of two tokens or more: nothing to score")
    return windows


def encode_long_documents(tokenizer: PreTrainedTokenizerBase, file: str | Path, context: int, count: int) -> list:
    """Return the first ``context`` ids of the first ``count`` documents that have as many, in file order.

    If the file has fewer such documents, all are returned. Raises ``HyLoError`` if it has none.
    """
    documents = []
    for text in read_texts(Path(file), tokenizer):
        if 4 * len(text) < context:  # a token has at least one byte of UTF-8, so tokenising is not needed
            continue
        ids = _encode_start(tokenizer, text, context)
        if len(ids) == context:
            documents.append(ids)
        if len(documents) == count:
            break
    if not documents:
        raise HyLoError(f"{file} holds no document of {context:,} tokens: give longer ones, or a shorter long context")
    return documents


def _encode_start(tokenizer: PreTrainedTokenizerBase, text: str, count: int) -> list[int]:
    """Return the first ``count`` ids of a text that may be far longer."""
    chars = 8 * count
    begun = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)  # a chat template has written BOS
    while True:
        ids = tokenizer(text[:chars], add_special_tokens=not begun, verbose=False).input_ids
        if chars >= len(text) or len(ids) > count + 8:  # the last ids depend on where the text was cut
            return ids[:count]
        chars *= 4


def batches(documents: list[list[int]], model: PreTrainedModel, batch_size: int | None) -> Iterator[list[list[int]]]:
    """Yield batches, longest documents first, so that rows of a batch have nearly one length and memory peaks at the
    start.
    """
    ordered = sorted(documents, key=len, reverse=True)
    while ordered:
        rows = rows_per_batch(model, len(ordered[0]), batch_size)
        yield ordered[:rows]
        ordered = ordered[rows:]


def token_losses(model: PreTrainedModel, ids_BS: torch.Tensor, chunk: int) -> torch.Tensor:
    """Return the negative log likelihood (nats, float32) of tokens 1.. of every row, [B, S-1]; 0 for ``IGNORED`` ids.

    Rows are padded on the right. No token depends on later ones, so padding needs no mask.
    """
    hidden_BSD = model.base_model(input_ids=ids_BS.clamp_min(0), use_cache=False).last_hidden_state
    hidden_TD = hidden_BSD[:, :-1].flatten(0, 1)
    targets_T = ids_BS[:, 1:].flatten()
    head = model.get_output_embeddings()
    losses = [
        F.cross_entropy(head(h_TD).float(), target_T, ignore_index=IGNORED, reduction="none")
        for h_TD, target_T in zip(hidden_TD.split(chunk), targets_T.split(chunk), strict=True)
    ]
    return torch.cat(losses).view(ids_BS.shape[0], -1)


def bucket_edges(context: int) -> list[int]:
    """Return 0, 128, 256, 512, ... up to ``context``."""
    edges, edge = [0], FIRST_BUCKET
    while edge < context:
        edges.append(edge)
        edge *= 2
    return [*edges, context]


def _by_position(loss_S: torch.Tensor, count_S: torch.Tensor) -> list[dict]:
    """Return the mean loss of the tokens at positions ``from`` <= p < ``to`` of their documents."""
    rows, edges = [], bucket_edges(len(loss_S))
    for start, end in zip(edges, edges[1:], strict=False):
        tokens = int(count_S[start:end].sum())
        if tokens:
            rows.append({"from": start, "to": end, "tokens": tokens, "loss": loss_S[start:end].sum().item() / tokens})
    return rows


def perplexity_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    context: int = 2048,
    max_tokens: int = 20_000,
    batch_size: int | None = None,
    chunk: int = 1024,
    label: str = "",
    whole: bool = False,
) -> dict:
    """Measure the perplexity per token of a JSON-lines file with documents cut to ``context``.

    ``whole``: complete documents, in windows of ``context``. Returns what ``score`` returns.
    """
    if context < 2 or max_tokens < 1:
        raise HyLoError(f"context {context} and {max_tokens} tokens to score: expected at least 2 and 1")
    documents = (encode_windows if whole else encode_documents)(tokenizer, file, context, max_tokens)
    return score(model, documents, file, batch_size, chunk, label)


def long_documents_of(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    file: str | Path,
    context: int = 32_768,
    count: int = 4,
    batch_size: int | None = None,
    chunk: int = 1024,
    label: str = "",
) -> dict:
    """Measure the loss of the first ``context`` tokens of ``count`` documents that are at least that long."""
    if context < 2 or count < 1:
        raise HyLoError(f"long context {context} and {count} long documents: expected at least 2 and 1")
    documents = encode_long_documents(tokenizer, file, context, count)
    return score(model, documents, file, batch_size, chunk, label)


@torch.inference_mode()
def score(
    model: PreTrainedModel,
    documents: list[list[int]],
    file: str | Path,
    batch_size: int | None = None,
    chunk: int = 1024,
    label: str = "",
) -> dict:
    """Compute the losses of ``documents``, the token ids of ``file``.

    ``chunk``: positions whose logits exist at a time. Returns perplexity, loss (nats per token), tokens and documents
    scored, by_position and seconds.
    """
    if any(getattr(model.config, name, None) not in (None, 1.0) for name in OTHER_HEADS):
        raise HyLoError(f"{model.config.model_type} scales or caps its logits, which this evaluation does not cover")
    began = shown = time.perf_counter()
    longest, total = max(map(len, documents)), sum(len(ids) - 1 for ids in documents)
    loss_S, count_S = (torch.zeros(longest, dtype=torch.float64) for _ in range(2))
    for batch in batches(documents, model, batch_size):
        ids_BS = torch.full((len(batch), len(batch[0])), IGNORED)
        for row, ids in enumerate(batch):
            ids_BS[row, : len(ids)] = torch.tensor(ids)
        losses = token_losses(model, ids_BS.to(model.device), chunk)
        loss_S[1 : ids_BS.shape[1]] += losses.double().sum(0).cpu()
        count_S[1 : ids_BS.shape[1]] += (ids_BS[:, 1:] != IGNORED).sum(0)
        if label and (time.perf_counter() - shown > 10 or count_S.sum() == total):
            shown = time.perf_counter()
            print(f"{label}: {int(count_S.sum())}/{total} tokens, {shown - began:.0f} s", flush=True)
    loss = loss_S.sum().item() / total
    if not math.isfinite(loss):
        raise HyLoError(f"the loss on {file} is not a finite number: the weights are broken or overflow in this dtype")
    return {
        "perplexity": math.exp(loss),
        "loss": loss,
        "tokens": total,
        "documents": len(documents),
        "by_position": _by_position(loss_S, count_S),
        "seconds": round(time.perf_counter() - began, 2),
    }
